--- check_cuda_build.lua [BUILD]: reads what ptxas reported while libvertex_cuda.so was built (BUILD/ptxas, written by
-- keep_ptxas_log.sh) and checks, without a GPU, that every kernel of kernels/*.cu has code for sm_80 and sm_90, that
-- the library also holds PTX for newer cards, and that no kernel marked VX_HOT spills registers. Prints registers,
-- stack and spills per kernel and architecture.

local build = arg[1] or "build"
local root = arg[0]:match "^(.*)/kernels/lab/[^/]*$" or "."
local ARCHITECTURES = { "sm_80", "sm_90" }

local function lines_of(command)
  local pipe = assert(io.popen(command))
  local list = {}
  for line in pipe:lines() do list[#list + 1] = line end
  pipe:close()
  return list
end

-- -- The kernels in the sources: VX_KERNEL [VX_HOT] [__launch_bounds__(...)] name(...) --------------------------------

local kernels, order = {}, {} -- kernels[file][name]; two files may have one of the same name
for _, path in ipairs(lines_of(("find '%s/kernels' -name '*.cu' -o -name '*.cuh' | grep -v /lab/ | sort"):format(root))) do
  local file = assert(io.open(path))
  local text = file:read("*a"):gsub("__launch_bounds__%b()", "")
  file:close()
  local base = path:match "[^/]+$"
  kernels[base] = {}
  for hot, name in text:gmatch "VX_KERNEL%s+(V?X?_?H?O?T?)%s*([%w_]+)%s*%(" do
    local kernel = { name = name, file = base, hot = hot == "VX_HOT", seen = {}, rows = {} }
    kernels[base][name] = kernel
    order[#order + 1] = kernel
  end
end

-- -- What ptxas said --------------------------------------------------------------------------------------------------

--- The kernel, of a file or of a header, whose name is the first identifier of a mangled name: _Z12unary_kernel..., or
-- with a namespace, _ZN3abc12unary_kernel...
local function kernel_of(mangled, file)
  for position, digits in mangled:gmatch "()(%d+)" do
    local first = position + #digits
    local name = mangled:sub(first, first + tonumber(digits) - 1)
    if kernels[file] and kernels[file][name] then return kernels[file][name] end
    for base, of in pairs(kernels) do
      if base:find "%.cuh$" and of[name] then return of[name] end
    end
  end
end

local unknown = {}
for _, path in ipairs(lines_of(("ls '%s'/ptxas/*.cu.o.log 2>/dev/null"):format(build))) do
  local row, file = nil, path:match "([^/]+)%.o%.log$"
  for line in io.lines(path) do
    local mangled, architecture = line:match "Compiling entry function '([^']+)' for '([^']+)'"
    if mangled then
      local kernel = kernel_of(mangled, file)
      row = { mangled = mangled, architecture = architecture, stack = 0, spills = 0, registers = 0 }
      if kernel then
        kernel.seen[architecture] = true
        kernel.rows[#kernel.rows + 1] = row
      elseif file ~= "selftest.cu" then
        unknown[#unknown + 1] = mangled
      end
    elseif row then
      local stack, stores,
        loads = line:match "(%d+) bytes stack frame, (%d+) bytes spill stores, (%d+) bytes spill loads"
      if stack then row.stack, row.spills = tonumber(stack), tonumber(stores) + tonumber(loads) end
      row.registers = tonumber(line:match "Used (%d+) registers") or row.registers
      row.shared = tonumber(line:match "(%d+) bytes smem") or row.shared
    end
  end
end

-- -- Report -----------------------------------------------------------------------------------------------------------

local faults = {}
local function fault(...) faults[#faults + 1] = string.format(...) end

print(("%-44s %-7s %9s %7s %7s %7s"):format("kernel", "code", "registers", "shared", "stack", "spills"))
for _, kernel in ipairs(order) do
  for _, row in ipairs(kernel.rows) do
    print(("%-44s %-7s %9d %7d %7d %7d%s"):format(kernel.name, row.architecture, row.registers, row.shared or 0,
      row.stack, row.spills,
      kernel.hot and "  hot" or ""))
    if kernel.hot and row.spills > 0 then
      fault("%s: %s is hot and spills %d bytes for %s (%s)", kernel.file, kernel.name, row.spills, row.architecture,
        row.mangled)
    end
  end
  for _, architecture in ipairs(ARCHITECTURES) do
    if not kernel.seen[architecture] then fault("%s: %s has no code for %s", kernel.file, kernel.name, architecture) end
  end
end
for _, mangled in ipairs(unknown) do fault("%s was compiled, but is no VX_KERNEL of kernels/*.cu", mangled) end
if #order == 0 then fault("no kernels found in %s/kernels", root) end

-- PTX: in the library itself where cuobjdump is there, else asked for in the compiler's commands
local objdump = lines_of("command -v cuobjdump || ls /usr/local/cuda/bin/cuobjdump 2>/dev/null")[1]
if objdump then
  local ptx = table.concat(lines_of(("'%s' --list-ptx '%s/libvertex_cuda.so'"):format(objdump, build)), "\n")
  if not ptx:find("sm_90", 1, true) then fault("libvertex_cuda.so holds no PTX for sm_90: %s", ptx) end
else
  local file = io.open(build .. "/compile_commands.json")
  local commands = file and file:read "*a" or ""
  if file then file:close() end
  if not commands:find("arch=compute_90,code=[compute_90]", 1, true) then
    fault("the library was not built with PTX for compute_90 (%s/compile_commands.json)", build)
  end
end

for _, text in ipairs(faults) do print("FAULT " .. text) end
print(#faults == 0 and ("%d kernels, all with code for %s"):format(#order, table.concat(ARCHITECTURES, " and "))
  or #faults .. " faults")
os.exit(#faults == 0 and 0 or 1)
