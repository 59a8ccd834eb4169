-- experiments/reproduce.lua: every study runs, draws its figure and says what it saw; it goes on where it stopped, a
-- part that fails ends no other, and five minutes show the order of Table 1 (#slow).

local A = require "tests.audio_files"
local H = require "tests.helper"
local json = require "vertex.json"
local lfs = require "lfs"
local vx = require "vertex"

local scratch = H.scratch "reproduce"
local STUDIES = { "table1", "table2", "k", "tightness", "gradient", "unselected", "subset", "cost", "shards",
  "codebook-size" }

local function reproduce(arguments)
  local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"
  return H.shell(("cd '%s' && VERTEX_LIB='%s' XDG_CACHE_HOME='%s' luajit '%s/experiments/reproduce.lua' --device cpu "
    .. "%s 2>&1"):format(scratch, library, scratch, H.root, arguments))
end

local function read(path) return assert(H.read(scratch .. "/" .. path), path) end
local function write(path, text) H.write(scratch .. "/" .. path, text) end

--- Every study's figure, its three sentences on the page, and its rows.
local function check_page(out, names)
  local results, page = json.decode(read(out .. "/results.json")), read(out .. "/results.md")
  for _, name in ipairs(names) do
    local found = assert(results.studies[name], name)
    assert.equal("\137PNG", read(("%s/%s.png"):format(out, name)):sub(1, 4))
    assert.truthy(page:find(("](%s.png)"):format(name), 1, true), name)
    assert.equal(3, #found.sentences)
    for _, sentence in ipairs(found.sentences) do
      assert.truthy(page:find(sentence, 1, true), sentence)
      assert.truthy(sentence:find "%d" and not sentence:find "nan", sentence)
    end
    assert.is_true(#found.rows >= 2, name)
  end
  return results
end

describe("reproduce", function()
  setup(function()
    lfs.mkdir(scratch)
    for _, split in ipairs { "train", "val" } do
      vx.runs.make_folders(scratch .. "/images/" .. split)
      vx.runs.make_folders(scratch .. "/speech/" .. split)
      for i = 1, split == "val" and 4 or 16 do
        vx.data.save(("%s/images/%s/%d.png"):format(scratch, split, i), vx.data.procedural(32, i, 1))
      end
      for i = 1, 2 do write(("speech/%s/%d.wav"):format(split, i), A.wav_of(A.noise(12000, i))) end
    end
  end)

  it("says of numbers what they say, and the contrary of contrary ones", function()
    local before = package.path
    package.path = H.root .. "/experiments/?.lua;" .. before
    local declared = dofile(H.root .. "/experiments/studies.lua")
    package.path = before
    local say = {}
    for _, study in ipairs(declared.studies) do say[study.name] = study.sentences end
    local function row(method, use, x)
      return { method = method, x = x, sd = {}, values = { code_use = use, rmse = 0.5, rmse_soft = 0.4, equal = 1 - use,
        loss = use, step_ms = 10 } }
    end
    local good = say.table1 { row("ste-euclid", 0.1), row("softmax-knn-ce", 0.9), row("softmax-ppl", 1) }
    local mixed = say.table1 { row("ste-euclid", 0.5), row("softmax-knn-ce", 0.9), row("softmax-knn-l2", 0.4) }
    local bad = say.table1 { row("ste-euclid", 0.9), row("softmax-knn-ce", 0.1) }
    assert.truthy(good[1]:find("90.0 % of the codes on average", 1, true), good[1])
    assert.truthy(good[1]:find("every one of the former uses more", 1, true), good[1])
    assert.truthy(mixed[1]:find("more on average, but not each", 1, true), mixed[1])
    assert.truthy(bad[1]:find("do not use more", 1, true), bad[1])
    for _, rising in ipairs { true, false } do
      local first, last = row("softmax-knn-ce", rising and 0.2 or 0.8, 0.25), row("softmax-knn-ce", 0.5, 1)
      local text = say.subset { first, last }[1]
      assert.equal(not rising, text:find("keeps the codes in use", 1, true) ~= nil, text)
    end
  end)

  --- Makes the tables and these studies into a folder, some of it twice.
  local function make(out, studies)
    local flags = "--minutes 0.02 --data images --speech speech --out %s --study %s"
    local output, status = reproduce(flags:format(out, table.concat(studies, ",")))
    assert.equal(0, status, output)
    local results = check_page(out, studies)
    local methods = {}
    for _, row in ipairs(results.studies.table1.rows) do methods[row.method] = row.values end
    assert.is_true(methods["ste-euclid"].code_use > 0 and methods["softmax-knn-ce"].rmse_soft > 0)
    assert.equal(13, #results.studies.table1.rows)
    for name, axis in pairs { k = { 1, 2, 4, 8 }, subset = { 0.25, 1 }, shards = { 1, 2, 4 },
      ["codebook-size"] = { 64, 256, 1024, 4096 } } do
      local found = {}
      for i, row in ipairs((results.studies[name] or { rows = {} }).rows) do found[i] = row.x end
      if results.studies[name] then assert.same(axis, found) end
    end
    -- CE's gradient does not fade far from the vertex, L2's does
    local far = {}
    for _, row in ipairs(results.studies.gradient.rows) do far[row.method] = row.values end
    assert.is_true(far["knn-ce"].grad_z > 10 * far["knn-l2"].grad_z)

    output, status = reproduce("--out " .. out)
    assert.equal(2, status)
    assert.truthy(output:find(("--out %s holds a reproduction already"):format(out), 1, true), output)
    local stored = json.decode(read(out .. "/results.json"))
    stored.studies.subset = nil
    write(out .. "/results.json", json.encode(stored))
    output, status = reproduce(("--out %s --study %s --resume"):format(out, table.concat(studies, ",")))
    assert.equal(0, status, output)
    local again = check_page(out, studies)
    assert.same(results.studies.subset.sentences[1], again.studies.subset.sentences[1])
  end

  it("makes both tables and studies, and goes on where it stopped",
    function() make("all", { "table1", "table2", "k", "subset", "gradient" }) end)
  it("makes every study #slow", function() make("every", STUDIES) end)

  it("goes past a part that fails, and refuses what it cannot do", function()
    lfs.mkdir(scratch .. "/nothing")
    local output, status = reproduce "--study k,gradient --minutes 0.02 --data nothing --out failing"
    assert.equal(1, status, output)
    assert.truthy(output:find("failed: k: the first steps of ae_sweep ended with status 2", 1, true), output)
    assert.truthy(read("failing/results.md"):find("failed: k:", 1, true))
    check_page("failing", { "gradient" })
    for arguments, expected in pairs { ["--study kk"] = "unknown study 'kk'; known: table1, table2, k,",
      ["--study ''"] = "--study '' names none; known: table1", ["--threads 0"] = "'0': expected an integer from 1 to",
      ["--minutes=-1"] = "--minutes -1: expected a positive number", ["--out all --resume --minutes 7"] =
        "was begun with --minutes 0.02, asked for is 7" } do
      output, status = reproduce(arguments)
      assert.equal(2, status, output)
      assert.truthy(output:find(expected, 1, true), output)
    end
  end)

  it("shows in five minutes that KNN methods use more codes than straight-through ones #slow", function()
    local output, status = reproduce "--minutes 5 --out five"
    assert.equal(0, status, output)
    local results, use = check_page("five", STUDIES), {}
    for _, row in ipairs(results.studies.table1.rows) do use[row.method] = row.values.code_use end
    for _, knn in ipairs { "softmax-knn-ce", "softmax-knn-l2", "sgumbel-knn-ce", "hgumbel-knn-ce" } do
      for _, ste in ipairs { "ste-euclid", "ste-cosine" } do assert.is_true(use[knn] > use[ste], knn .. " " .. ste) end
    end
  end)
end)
