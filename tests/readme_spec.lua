-- The README says what is so: its table of quantizers, its commands, its example.

local H = require "tests.helper"
local core = require "vertex.core"
local lfs = require "lfs"

local function readme()
  local f = assert(io.open(core.root .. "/README.md"))
  local text = f:read "*a"
  f:close()
  return text
end

describe("README", function()
  it("lists the quantizers as their files describe them", function()
    local p = io.popen(("cd '%s' && luajit experiments/readme_table.lua --check 2>&1"):format(core.root))
    assert.equal("up to date\n", p:read "*a")
    p:close()
  end)

  it("names folders and files that are there", function()
    for path in readme():gmatch "%]%(([%w%-_./]+)%)" do
      assert.truthy(core.file_size(core.root .. "/" .. path), path)
    end
    for path in readme():gmatch "luajit ([%w_/]+%.lua)" do
      assert.truthy(core.file_size(core.root .. "/" .. path), path)
    end
  end)

  it("of the tests names every file beside it", function()
    local text = H.read(core.root .. "/tests/README.md")
    for file in lfs.dir(core.root .. "/tests") do
      local name = file:match "^(.*)%.lua$" or file:match "^.*%.py$"
      assert.truthy(not name or text:find("`" .. name, 1, true), "tests/README.md does not name " .. file)
    end
  end)

  it("shows an example that runs", function()
    local example = readme():match "```lua\n(.-)```"
    local printed = {}
    local chunk = assert(loadstring(example))
    setfenv(chunk, setmetatable({ print = function(...)
      for i = 1, select("#", ...) do printed[#printed + 1] = tostring((select(i, ...))) end
    end }, { __index = _G }))
    local path = package.path
    chunk()
    package.path = path -- the example adds to it
    assert.equal(6, #printed)
    assert.truthy(printed[1]:find("f32 (8192,32) on cpu", 1, true), printed[1])
  end)
end)
