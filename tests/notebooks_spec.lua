-- The notebooks, run from their files with fewer steps; and the runner that needs no Jupyter.

local H = require "tests.helper"
local json = require "vertex.json"

local root, shell = H.root, H.shell
local NAMES = { "01-the-simplex", "02-collapse-and-cure", "03-your-own-quantizer", "04-what-was-trained" }

--- A copy of the checkout, as far as notebooks see it, in which they may leave files.
local checkout
local function run(arguments)
  if not checkout then
    checkout = H.scratch "notebooks"
    local command = "mkdir '%s' && cd '%s' && cp -r '%s/notebooks' . && ln -s '%s'/lua '%s'/experiments '%s'/build ."
    local out, rc = shell(command:format(checkout, checkout, root, root, root, root))
    assert(rc == 0, out)
  end
  return shell(("cd '%s' && timeout 200 luajit notebooks/run.lua %s"):format(checkout, arguments))
end

local function notebook(...)
  local cells = {}
  for i = 1, select("#", ...) do cells[i] = { cell_type = "code", source = (select(i, ...)) } end
  return H.write(H.scratch "test.ipynb", json.encode { cells = cells, nbformat = 4 })
end

describe("the notebooks", function()
  it("are notebooks for Vertex without an error in them", function()
    for _, name in ipairs(NAMES) do
      local text = assert(H.read(("%s/notebooks/%s.ipynb"):format(root, name)))
      local content = assert(json.decode(text), name)
      assert.same({ 4, "vertex" }, { content.nbformat, content.metadata.kernelspec.name })
      assert.truthy(#text < 600000, name .. " holds large outputs")
      for _, cell in ipairs(content.cells) do
        for _, output in ipairs(cell.outputs or {}) do assert.not_equal("error", output.output_type) end
      end
    end
  end)

  it("run: the simplex and the two regularizers", function()
    local out, rc = run "--set steps=100 notebooks/01-the-simplex.ipynb"
    assert.equal(0, rc, out)
    assert.equal(6, select(2, out:gsub("%[image/png, %d+ bytes%]", "")))
    local ppl, knn = out:match "\ncollapsed +([%d.]+) +([%d.]+)"
    local ppl_centered, knn_vertices = out:match "\ncentered +([%d.]+)", out:match "\nvertices +[%d.]+ +([%d.]+)"
    assert.truthy(tonumber(ppl) > tonumber(ppl_centered) and tonumber(knn) > tonumber(knn_vertices), out)
  end)

  it("run: collapse, and its cure", function()
    local out, rc = run "--set steps=8 notebooks/02-collapse-and-cure.ipynb"
    assert.equal(0, rc, out)
    assert.equal(3, select(2, out:gsub("%[image/png, %d+ bytes%]", "")))
    for _, method in ipairs { "ste%-cosine", "softmax%-ppl", "softmax%-knn%-ce" } do
      assert.truthy(out:find("\n" .. method .. " +[%d.]+ +[%d.]+ +[%d.]+ +%d+/128\n"), method .. out)
    end
  end)

  it("run: your own quantizer, which is then in the help and in the sweep", function()
    local out, rc = run "--set steps=2 notebooks/03-your-own-quantizer.ipynb"
    assert.equal(0, rc, out)
    assert.truthy(out:find "\n  ste%-knn +straight%-through on the sphere, each code's K nearest rows", out)
    assert.truthy(out:find "\nste%-knn +[%d.]+%% +[%d.]+%% ", out)
    assert.truthy(out:find("ste-knn: z (512,15) should have width 16", 1, true), out)
    assert.truthy(H.read(checkout .. "/notebooks/out/notebook-03/results.csv"):find("\nste-knn,1,", 1, true))
  end)

  it("run: using what was trained, codes and codebook to NumPy's files and back", function()
    local out, rc = run "--set steps=2 notebooks/04-what-was-trained.ipynb"
    assert.equal(0, rc, out)
    assert.equal(2, select(2, out:gsub("%[image/png, %d+ bytes%]", "")))
    assert.equal(2, select(2, out:gsub("max%(%):item%(%)\n0\n", ""))) -- codes and pictures are the same
    local vx = H.vx
    local folder = checkout .. "/notebooks/out/notebook-04/"
    assert.same({ 8 * 8 * 8, 1 }, vx.load(folder .. "codes.npy"):shape())
    local stored = vx.load(folder .. "checkpoints/softmax-knn-ce.safetensors")
    assert.equal(stored["model.quantizer.codebook"]:bytes(), vx.load(folder .. "codebook.npy"):bytes())
  end)

  it("run in Jupyter #slow", function()
    if select(2, shell "jupyter nbconvert --version") ~= 0 then return pending "jupyter-nbconvert is not installed" end
    run "--set steps=1 notebooks/01-the-simplex.ipynb"
    assert.equal(0, select(2,
      shell(("luajit '%s/lua/vertex/interactive/jupyter.lua' install --prefix '%s'"):format(checkout, checkout))))
    local convert = "cd '%s' && JUPYTER_PATH=share/jupyter timeout 120 "
      .. "jupyter nbconvert --to notebook --execute --stdout '%s'"
    local out, rc = shell((convert .. " 2>/dev/null"):format(checkout, "notebooks/01-the-simplex.ipynb"))
    assert.equal(0, rc, out)
    assert.equal(6, select(2, out:gsub('"image/png": "iVBOR', "")))
    H.write(checkout .. "/wrong.ipynb",
      (H.read(checkout .. "/notebooks/01-the-simplex.ipynb"):gsub("n = 300 ", "n = nothing.there ")))
    out, rc = shell(convert:format(checkout, "wrong.ipynb"))
    assert.equal(1, rc)
    assert.truthy(out:find("attempt to index global 'nothing'", 1, true), out)
  end)
end)

describe("the runner", function()
  it("shows values, prints, and what is replaced only as it is at last", function()
    local out, rc = run(notebook("local a = 1\nprint(a)\na + 1", "a;",
      "local d = require 'vertex.interactive.display'\nfor i = 1, 3 do d.show('step ' .. i, { id = 1 }) end",
      "setmetatable({}, { __mime = function() return { ['image/png'] = '12345', ['text/plain'] = 'x' } end })"))
    assert.equal(0, rc, out)
    assert.truthy(out:find("a + 1\n1\n2\n> a;\n> local", 1, true), out)
    assert.truthy(out:find("\nstep 3\n", 1, true) and not out:find "step [12]", out)
    assert.truthy(out:find("[image/png, 5 bytes]", 1, true), out)
  end)

  it("keeps the pictures where --pictures says", function()
    local out, rc = run("--pictures kept/all " .. notebook("local function p(s) return setmetatable({}, { __mime = "
      .. "function() return { ['image/png'] = s, ['text/plain'] = 'x' } end }) end\np '12345'", "p 'second'"))
    assert.equal(0, rc, out)
    assert.truthy(out:find("%[image/png, 5 bytes: [^\n]*/kept/all/test%-1%.png%]"), out)
    assert.same({ "12345", "second" }, { H.read(checkout .. "/kept/all/test-1.png"),
      H.read(checkout .. "/kept/all/test-2.png") })
  end)

  it("ends with the first error, at its line", function()
    local path = notebook("x = 1", "local y = x\n\nlocal z = y.a.b", "print 'never'")
    local out, rc = run(path)
    assert.equal(1, rc)
    assert.truthy(out:find("[2]:3: attempt to index", 1, true), out)
    assert.falsy(out:find("never", 1, true), out)
  end)

  it("sets variables, and says where there are none", function()
    local path = notebook("other_steps = 9\nlocal steps = 300 -- many\nsteps", "steps = 4\nsteps")
    local out, rc = run("--set steps=7 " .. path)
    assert.same({ 0, 2 }, { rc, select(2, out:gsub("\n7\n", "")) + select(2, out:gsub("\n4\n", "")) }, out)
    out, rc = run("--set stepps=7 " .. path)
    assert.equal(2, rc)
    assert.truthy(out:find("sets no such variable", 1, true), out)
  end)

  it("explains wrong arguments", function()
    local text = H.write(H.scratch "text.ipynb", "no json")
    for arguments, expected in pairs { [""] = "which notebook?", ["--fast"] = "unknown option --fast",
      ["--set steps"] = "expected NAME=VALUE", ["--pictures"] = "expected a folder",
      ["nowhere.ipynb"] = "nowhere.ipynb: No such file", [text] = "is no notebook" } do
      local out, rc = run(arguments)
      assert.equal(2, rc, arguments)
      assert.truthy(out:find(expected, 1, true), out)
    end
  end)
end)
