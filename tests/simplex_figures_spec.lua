-- The figures of the simplex as a user makes them: experiments/simplex_figures.lua in a child process.

local H = require "tests.helper"
local lfs = require "lfs"

local folder

local function figures(arguments)
  local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"
  return H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s/experiments/simplex_figures.lua' %s"):format(folder, library,
    H.root, arguments))
end

local function read(path) return H.read(folder .. "/" .. path) end

describe("simplex_figures", function()
  setup(function()
    folder = H.scratch "simplex-figures"
    assert(lfs.mkdir(folder))
  end)

  it("writes every figure in three formats, and scores ordered as in Figure 1", function()
    local output, status = figures "--out a/b --quick --seed 3"
    assert.equal(0, status, output)
    local heads = { png = "\137PNG", svg = "<?xm", pdf = "%PDF" }
    for _, name in ipairs { "figure1", "figure2", "gradients", "motion-uniform", "motion-collapsed" } do
      for ending, head in pairs(heads) do assert.equal(head, read(("a/b/%s.%s"):format(name, ending)):sub(1, 4)) end
    end
    local scores = {}
    for distribution, score, mean in read("a/b/scores.csv"):gmatch "(%w+),([%w_-]+),([%d.e+-]+)," do
      scores[score] = scores[score] or {}
      scores[score][distribution] = tonumber(mean)
    end
    -- B: ppl tells only collapse from the rest; C: both KNN distances are least at the vertices and large where a
    -- vertex is alone
    for _, name in ipairs { "vertices", "uniform", "centered" } do assert.is_true(scores.perplexity[name] > 2.9) end
    assert.is_true(scores.perplexity.collapsed < 2.5)
    for _, score in ipairs { "knn-l2", "knn-ce" } do
      for _, name in ipairs { "uniform", "centered", "collapsed" } do
        assert.is_true(scores[score].vertices < 0.5 * scores[score][name])
      end
      assert.is_true(scores[score].collapsed > 2 * scores[score].uniform)
    end
  end)

  it("draws the same with the same seed", function()
    figures "--out one --quick --seed 5"
    figures "--out two --quick --seed 5"
    figures "--out three --quick --seed 6"
    for _, file in ipairs { "figure1.png", "gradients.png", "motion-collapsed.png", "scores.csv" } do
      assert.equal(read("one/" .. file), read("two/" .. file))
      assert.not_equal(read("one/" .. file), read("three/" .. file))
    end
  end)

  it("says what is wrong with its flags", function()
    local output, status = figures "--seed x"
    assert.is_true(status ~= 0)
    assert.matches("%-%-seed", output)
    output, status = figures "--colour red"
    assert.is_true(status ~= 0)
    assert.matches("%-%-colour", output)
    local file = assert(io.open(folder .. "/taken", "w"))
    file:close()
    output, status = figures "--out taken/here --quick"
    assert.is_true(status ~= 0)
    assert.matches("taken", output)
    output = figures "--help"
    for _, flag in ipairs { "--out", "--seed", "--quick" } do assert.is_truthy(output:find(flag, 1, true)) end
  end)
end)
