-- experiments/vq_sweep.lua: codebooks and codes of a file's vectors, what they reconstruct, and what is refused.

local H = require "tests.helper"
local vx = require "vertex"
local lfs = require "lfs"

local root = lfs.currentdir()
local folder = H.scratch "vq-sweep"
lfs.mkdir(folder)

local function sweep(arguments, before)
  return H.shell(("cd '%s' && %s luajit '%s/experiments/vq_sweep.lua' --device cpu %s 2>&1"):format(folder,
    before or "", root, arguments))
end

--- 300 rows around 12 centers, far from the origin and of another scale.
local function vectors()
  local T = H.generator(4)
  local centers, list = T({ 12, 6 }, { grad = false, low = -50, high = 50 }):totable(), {}
  local noise = T({ 300, 6 }, { grad = false }):totable()
  for n = 1, 300 do
    list[n] = {}
    for d = 1, 6 do list[n][d] = 1000 + centers[n % 12 + 1][d] + noise[n][d] end
  end
  return vx.tensor(list)
end

describe("vq_sweep", function()
  local x = vectors()
  vx.save(folder .. "/x.npy", x)

  it("writes codes and codebook that reconstruct the vectors with the error it reports", function()
    local out, status = sweep("--data x.npy --codes 12 --k 4 --batch 64 --steps 60 --out run "
      .. "--methods kmeans,kmeans-random,ste-euclid")
    assert.equal(0, status, out)
    local csv = H.read(folder .. "/run/results.csv")
    local mean = x:mean(1)
    local spread = (x - mean):square():sum():item()
    for _, method in ipairs { "kmeans", "kmeans-random", "ste-euclid" } do
      local codes = vx.load(folder .. "/run/" .. method .. ".codes.npy")
      local codebook = vx.load(folder .. "/run/" .. method .. ".codebook.npy")
      assert.same({ 300, 1 }, codes:shape())
      assert.same({ 1, 12, 6 }, codebook:shape())
      local back = vx.gather(codebook:reshape { 12, 6 }, codes:reshape { 300 })
      local error = (back - x):square():sum():item() / spread
      local told = tonumber(csv:match("\n" .. method:gsub("%-", "%%-") .. ",%d+,([%d.e-]+)"))
      assert.is_true(math.abs(error - told) < 1e-3 * error + 1e-6, ("%s: %g, told %g"):format(method, error, told))
      local tensors, meta = vx.load(folder .. "/run/" .. method .. ".safetensors")
      assert.equal(method, meta.method)
      assert.same(codes:totable(), tensors.codes:totable())
    end
    local kmeans = tonumber(csv:match "\nkmeans,%d+,([%d.e-]+)")
    assert.is_true(kmeans < 0.05, "k-means should find the twelve centers or nearly: " .. kmeans)
  end)

  it("encodes with a saved codebook, and refuses another width and what it did not write", function()
    local out, status = sweep "--encode run/ste-euclid.safetensors --data x.npy --out again.npy"
    assert.equal(0, status, out)
    assert.equal(H.read(folder .. "/run/ste-euclid.codes.npy"), H.read(folder .. "/again.npy"))
    vx.save(folder .. "/narrow.npy", vx.zeros { 4, 5 })
    out, status = sweep "--encode run/ste-euclid.safetensors --data narrow.npy --out no.npy"
    assert.equal(2, status)
    assert.truthy(out:find("narrow.npy holds vectors of width 5, the codebook of run/ste-euclid.safetensors is for "
      .. "width 6", 1, true), out)
    vx.save(folder .. "/other.safetensors", { x = vx.zeros { 1 } })
    out, status = sweep "--encode other.safetensors --data x.npy --out no.npy"
    assert.equal(2, status)
    assert.truthy(out:find("other.safetensors was not written by vq_sweep", 1, true), out)
    assert.is_nil(lfs.attributes(folder .. "/no.npy"))
  end)

  it("resumes to the same bits, also with groups and an encoder", function()
    local flags = "--data x.npy --codes 8 --groups 2 --k 4 --batch 32 --methods softmax-knn-ce --encoder affine "
    local out, status = sweep(flags .. "--steps 12 --out whole")
    assert.equal(0, status, out)
    local stop = "--checkpoint 0 --steps 12 --out parts "
    sweep(flags .. stop, "timeout -s KILL 0.6")
    out, status = sweep(flags .. stop .. "--resume")
    assert.equal(0, status, out)
    local function without_seconds(path) -- and memory, the last two columns
      return (H.read(folder .. path):gsub(",[^,\n]*,[^,\n]*\n", "\n"))
    end
    assert.equal(without_seconds "/whole/results.csv", without_seconds "/parts/results.csv")
    assert.equal(H.read(folder .. "/whole/softmax-knn-ce.codes.npy"),
      H.read(folder .. "/parts/softmax-knn-ce.codes.npy"))
  end)

  it("logs the same after a stop between two log lines", function()
    local common = "--codes 8 --k 4 --batch 16 --steps 600 --checkpoint 0 --quiet --methods softmax-ppl --out "
    local output, status = sweep(common .. "between-whole")
    assert.equal(0, status, output)
    local stopped -- the folder of a run that was killed between log lines: after the first checkpoint, then and there
    for try = 1, 20 do
      local out = "between-" .. try
      local path = ("%s/%s/checkpoints/softmax-ppl.safetensors"):format(folder, out)
      H.shell(("cd '%s'; luajit '%s/experiments/vq_sweep.lua' --device cpu %s%s >/dev/null 2>&1 & pid=$!; "
        .. "until [ -e '%s' ] || ! kill -0 $pid; do sleep 0.005; done; kill -9 $pid; wait $pid"):format(folder, root,
        common, out, path))
      local step = vx.runs.checkpoint.peek(path).step
      if step < 600 and step % 6 ~= 0 then
        stopped = out
        break
      end
    end
    assert.truthy(stopped, "the run was never stopped between log lines")
    output, status = sweep(common .. stopped .. " --resume")
    assert.equal(0, status, output)
    for _, file in ipairs { "metrics.jsonl", "curves.png" } do
      assert.equal(H.read(folder .. "/between-whole/" .. file), H.read(folder .. "/" .. stopped .. "/" .. file))
    end
  end)

  it("refuses what cannot work before anything is written", function()
    local function refused(arguments, text)
      local out, status = sweep(arguments .. " --out refused")
      assert.equal(2, status, out)
      assert.truthy(out:find(text, 1, true), out)
      assert.is_nil(lfs.attributes(folder .. "/refused"))
    end
    refused("--data none.npy", "no such file or folder")
    refused("--data x.npy --groups 4", "--groups 4 does not divide the width 6")
    refused("--data x.npy --methods kmean", "kmeans")
    vx.save(folder .. "/cube.npy", vx.zeros { 2, 2, 2 })
    refused("--data cube.npy", "has the shape (2,2,2), expected rows of numbers")
    refused("--preset vectors", "--preset vectors needs --data")
  end)

  it("names constant vectors and those with a NaN", function()
    vx.save(folder .. "/same.npy", vx.ones { 20, 3 })
    local out, status = sweep "--data same.npy --codes 4 --k 2 --methods kmeans --out same"
    assert.equal(1, status)
    assert.truthy(out:find("the 20 vectors are all equal", 1, true), out)
    vx.save(folder .. "/nan.npy", vx.tensor { { 1, 2 }, { 3, 0 / 0 } })
    out, status = sweep "--data nan.npy --codes 2 --k 1 --methods kmeans --out nan"
    assert.equal(1, status)
    assert.truthy(out:find("nan.npy: row 1 (0-based) holds a NaN or Inf", 1, true), out)
  end)
end)
