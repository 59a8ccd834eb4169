-- What happens around a run goes wrong: the disk is full or read-only, its folder or a file of it goes, its output is
-- closed, its terminal too, there is no HOME, the clock jumps. The error has a name, and --resume ends with what a run
-- in peace leaves. Kills are in kills.lua, two processes on one folder in runs_spec.lua.

local H = require "tests.helper"
local lfs = require "lfs"

local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"
local METHODS = "--methods ste-euclid,softmax-knn-ce"
local scratch

--- Runs a shell text in the scratch folder, where RUN is the experiment with a checkpoint after every step.
local function shell(text)
  local run = ("luajit '%s/tests/fixtures/experiments/vectors.lua' --checkpoint 0 --quiet %s"):format(H.root, METHODS)
  text = text:gsub("%f[%w]RUN%f[%W]", run)
  return H.shell(("cd '%s' && export VERTEX_LIB='%s'; %s"):format(scratch, library, text))
end

local function read(path) return H.read(scratch .. "/" .. path) end

--- Fails unless a folder holds what the run in peace left.
local function expect_whole(out)
  assert.equal(read "whole/metrics.jsonl", read(out .. "/metrics.jsonl"))
  local function files(folder)
    return (H.shell(("cd '%s/%s' && find . -type f | sort"):format(scratch, folder)))
  end
  assert.equal(files "whole", files(out))
end

--- Shell text that waits until the process $pid has written a file.
local function until_written(file)
  return ("until [ -s %s ]; do kill -0 $pid || exit 9; sleep 0.01; done; "):format(file)
end

describe("a run", function()
  setup(function()
    scratch = H.scratch "faults"
    assert(lfs.mkdir(scratch))
    local output, status = shell "RUN --steps 20 --out whole"
    assert.equal(0, status, output)
  end)

  it("does not write what it prints into its files, where standard output or errors are closed", function()
    for i, closed in ipairs { ">&-", ">&- 2>&-", "<&- >&- 2>&-" } do
      local out = "closed" .. i
      local output, status = shell(("RUN --steps 20 --out %s %s"):format(out, closed))
      assert.equal(1, status, output) -- the table could not be printed
      assert.equal("", read(out .. "/.lock"))
      expect_whole(out)
    end
    local output, status = shell "RUN --steps 20 --out closed4 2>&-"
    assert.equal(0, status, output)
    expect_whole "closed4"
  end)

  it("needs no HOME", function()
    local output, status = shell("unset HOME; RUN --steps 20 --out homeless")
    assert.equal(0, status, output)
    expect_whole "homeless"
  end)

  it("stops after a step where its terminal closes, however often that is said, and not under nohup", function()
    local output, status = shell("RUN --steps 300000 --checkpoint 1000 --out hung >said 2>&1 & pid=$!; "
      .. until_written "hung/metrics.jsonl" .. "kill -HUP $pid; kill -HUP $pid; wait $pid")
    assert.equal(130, status, output .. (read "said" or ""))
    assert.truthy(read "hung/checkpoints/ste-euclid.safetensors")
    output, status = shell("trap '' HUP; RUN --steps 20 --out ignored & pid=$!; "
      .. until_written "ignored/metrics.jsonl" .. "kill -HUP $pid; wait $pid")
    assert.equal(0, status, output)
    expect_whole "ignored"
  end)

  it("ends with an error where its folder goes", function()
    local output, status = shell("RUN --steps 300000 --out gone & pid=$!; "
      .. until_written "gone/checkpoints/ste-euclid.safetensors" .. "mv gone elsewhere; wait $pid")
    assert.equal(1, status, output)
    assert.truthy(output:find "gone/[%w/.-]+: .*[Nn]o such file or directory", output)
  end)

  it("says that the disk is full or read-only, and goes on once it is not", function()
    local mounted = "mkdir -p disk && mount -t tmpfs -o size=%s tmpfs disk && %s"
    local function within(size, text) -- in a namespace of its own, whose mounts go with it
      return shell(("unshare --map-root-user --mount sh -c \"%s\""):format(mounted:format(size, text)))
    end
    local output, status = within("16k", "true")
    if status ~= 0 then return pending("no file system can be mounted here: " .. output) end
    output, status = within("16k", "head -c 99999 /dev/zero >disk/rest; RUN --steps 20 --seeds 1,2 --out disk/d")
    assert.equal(2, status, output)
    assert.truthy(output:find "not writable: write disk/d/series.json: No space left on device\n$", output)
    for _, size in ipairs { "4k", "8k", "12k", "20k", "44k" } do
      local out = "full" .. size
      output, status = within(size, ("RUN --steps 20 --out disk/d; echo status \\$?; mount -o remount,size=9m disk; "
        .. "RUN --steps 20 --resume --out disk/d && cp -r disk/d %s"):format(out))
      assert.equal(0, status, output)
      assert.truthy(output:find("write disk/d/[%w/.-]+: No space left on device", 1), output)
      assert.truthy(output:find "status [12]\n", output)
      assert.falsy(output:find("traceback", 1, true), output)
      expect_whole(out)
    end
    output, status = within("9m,ro", "RUN --steps 20 --out disk/d")
    assert.equal(2, status, output)
    assert.truthy(output:find("cannot make the folder 'disk/d': Read-only file system", 1, true), output)
    output, status = within("9m", "RUN --steps 2 --out disk/d; mount -o remount,ro disk; RUN --resume --out disk/d")
    assert.truthy(status ~= 0 and output:find("Read-only file system", 1, true), output)
  end)

  it("does not depend on a clock that jumps", function()
    local fake = H.shell "ls /usr/lib/*/faketime/libfaketimeMT.so.1 2>/dev/null":match "[^\n]+"
    if not fake then return pending "there is no libfaketime (apt: faketime)" end
    local output, status = shell(("echo '@2020-01-01 00:00:00' >clock; export FAKETIME_TIMESTAMP_FILE=$PWD/clock "
      .. "FAKETIME_NO_CACHE=1 LD_PRELOAD='%s'; RUN --steps 20 --out jumped & pid=$!; "
      .. "for day in 2031-01-01 1999-01-01 2020-01-02 2037-01-01; do sleep 0.1; echo \"@$day 00:00:00\" >clock; done; "
      .. "wait $pid"):format(fake))
    assert.equal(0, status, output)
    expect_whole "jumped"
  end)
end)
