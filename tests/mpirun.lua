--- mpirun.lua: what specs of several ranks share: starting them.
--     local mpirun = require "tests.mpirun"

local H = require "tests.helper"

local M = {}

--- Says why ranks cannot be started here; nil where they can.
local function no_ranks()
  if select(2, H.shell "command -v mpirun") ~= 0 then return "no mpirun: apt-get install openmpi-bin" end
  if not H.read(H.root .. "/build/libvertex_mpi.so") then return "no build/libvertex_mpi.so: ./setup.sh builds it" end
end

--- Gives a function like busted's it(), pending where no ranks can be started.
function M.needed(it, pending)
  return function(title, f)
    it(title, function()
      local reason = no_ranks()
      if reason then pending(reason) else f() end
    end)
  end
end

--- Shell text that keeps a launcher's variables from what comes after: a launcher does not start under another.
M.clean = "unset $(env | sed -nE 's/^((OMPI|PMIX|PMI|SLURM)_[A-Za-z0-9_]*)=.*/\\1/p');"

--- Gives the shell command that runs others under mpirun: { n, command, n, command, ... }.
function M.command(parts)
  local words = {}
  for i = 1, #parts, 2 do words[#words + 1] = ("-np %d %s"):format(parts[i], parts[i + 1]) end
  return "mpirun --allow-run-as-root --oversubscribe --bind-to none " .. table.concat(words, " : ") .. " < /dev/null"
end

local ENVIRONMENT = "export OMPI_MCA_btl_vader_single_copy_mechanism=none VERTEX_LIB='%s' %s;"

local function environment(more)
  return M.clean .. ENVIRONMENT:format(os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so", more or "")
end

--- Runs n ranks of a command in a folder, with more environment ("A=1 B=2"); gives the output and the status.
function M.run(folder, n, command, more)
  return H.shell(("cd '%s'; %s timeout --foreground 60 %s"):format(folder, environment(more),
    M.command(type(command) == "table" and command or { n, command })))
end

--- Runs ranks until a file is there, then shell text with mpirun's number in $pid and those of its children in $ranks;
-- gives the output, mpirun's status, the seconds from the text to the end, and whether a rank was left over.
function M.run_until(folder, n, command, file, text, more)
  local script = H.write(H.scratch "until.sh", ([[
    set -m
    cd '%s'; %s
    %s & pid=$!
    for i in $(seq 600); do [ -e '%s' ] && break; sleep 0.05; done
    [ -e '%s' ] || { echo "no %s"; kill -9 $pid; }
    ranks=$(ps -o pid= --ppid $pid)
    began=$(date +%%s%%N)
    %s
    wait $pid; status=$?
    echo "ended in $((($(date +%%s%%N) - began) / 1000000)) ms with $status"
    alive() { case $(ps -o stat= -p $1) in '' | Z*) false ;; esac; }
    for rank in $ranks; do
      for i in $(seq 50); do alive $rank && sleep 0.1; done
      alive $rank && { kill -9 $rank; echo "left over: $rank"; }
    done
    true
  ]]):format(folder, environment(more), M.command { n, command }, file, file, file, text))
  local output = H.shell(("timeout --foreground 90 bash '%s'"):format(script))
  local ms, status = output:match "ended in (%d+) ms with (%d+)"
  return output, tonumber(status), tonumber(ms or 1e9) / 1000, output:find "left over" ~= nil
end

return M
