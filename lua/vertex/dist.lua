--- dist: several processes that train together, the ranks of one job. mpirun or srun starts them, one for each GPU or
-- each share of the CPU:
--
--     mpirun -np 4 luajit train.lua
--
--     local dist = vx.dist
--     local gradients = dist.gradients(model:parameters())    -- buckets that are averaged while backward still runs
--     dist.broadcast_all(model:state_dict())                  -- all begin alike
--     for step = 1, steps do
--       local loss = ...                                      -- of this rank's part of the batch
--       optimizer:zero_grad()
--       gradients:backward(loss)                              -- in place of loss:backward()
--       optimizer:step()
--     end
--     dist.close()                                            -- last, by every rank
--
-- Without a launcher there is one rank, and the same lines do what they would do without vx.dist. The first function
-- that is called joins the job: a device and a share of the cores become this rank's own. What is said to be collective
-- has to be called by all ranks, in the same order; a rank that does not come within VERTEX_RANK_TIMEOUT seconds (25)
-- is an error on the others. After an error a process ends all by dist.abort, or by ending itself.
--
-- Sums have the same bits on all ranks, and twice with as many ranks. Ctrl-C (SIGTERM, as mpirun sends it) is seen by
-- all ranks after the same exchange of numbers, of which every gradients:backward makes one.

local check = require "vertex.check"
local core = require "vertex.core"
local tape = require "vertex.tape"

local dist = {}
local fail = core.fail

-- rank and size; local_rank and local_size: among the ranks of this machine; clock: of rank 0, at the last exchange
local me

-- -- Joining ----------------------------------------------------------------------------------------------------------

--- This rank's GPU where nobody has chosen a device: that of its number on this machine.
local function choose_device()
  if core.device_is_chosen() then return end
  local count = core.device_count "cuda"
  if count == 0 then return end
  if me.local_size > count then
    fail("%d ranks on a machine with %d GPU%s, expected at most one for each; --device cuda:0 puts all of them on one, "
      .. "--device cpu on none", me.local_size, count, count == 1 and "" or "s")
  end
  core.device("cuda:" .. me.local_rank)
end

--- Finds who else is on this machine, and takes a share of the cores.
local function settle()
  local own = core.rank_place()
  local host, mask, allowed, cores = unpack(own)
  local sharing = 0
  me.local_rank, me.local_size = 0, 0
  for r, place in ipairs(core.rank_lists(own, me.size)) do
    if place[1] == host then
      if r - 1 < me.rank then me.local_rank = me.local_rank + 1 end
      me.local_size = me.local_size + 1
      if place[2] == mask then sharing = sharing + 1 end
    end
  end
  me.cores, me.fair_share = cores, math.max(1, math.floor(cores / me.local_size))
  me.threads = math.max(1, math.floor(allowed / sharing))
  core.threads(me.threads)
end

--- Joins the job on first use.
local function joined()
  if me then return me end
  core.rank_open()
  me = { clock = core.time() }
  me.rank, me.size = core.rank_numbers()
  me.local_rank, me.local_size = 0, 1
  if me.size > 1 then
    core.rank_hold_interrupts(true)
    settle()
    choose_device()
  end
  return me
end

--- Says which of the ranks this process is. It joins the job where this was not done yet, as every function here does.
-- @return number from 0; 0 without a launcher
-- @raise where a launcher started several processes that cannot find each other, with what is missing
function dist.rank() return joined().rank end

--- Says how many ranks there are.
-- @return number, 1 without a launcher
-- @raise as rank
function dist.size() return joined().size end

--- Names what joins the ranks.
-- @return "self" for one rank, or "mpi (Open MPI v4.1.4)"
-- @raise as rank
function dist.name()
  joined()
  return core.rank_group()
end

--- Describes the job in a line for people: ranks, what joins them, and cores; a second line where the launcher gives
-- each rank fewer cores than there are.
-- @return text; nil for one rank
-- @raise as rank
function dist.about()
  local m = joined()
  if m.size == 1 then return nil end
  local text = ("%d ranks by %s, %d of them here, each with %d of %d cores"):format(m.size, dist.name(), m.local_size,
    core.threads(), m.cores)
  if m.threads < m.fair_share then
    text = text .. ("\nthe launcher binds this rank to %d core%s where %d are its share: mpirun --bind-to none lets it "
      .. "use them"):format(m.threads, m.threads == 1 and "" or "s", m.fair_share)
  end
  return text
end

-- -- Verbs ------------------------------------------------------------------------------------------------------------

local function expect_tensor(op, x)
  if not core.is_tensor(x) then fail("%s: a %s, expected a tensor", op, type(x)) end
  return x
end

--- Sums a tensor over the ranks, in place: every element in the order of the ranks, in double, rounded once.
-- Collective.
-- @param x tensor f32 or i32, contiguous, of any shape, the same on all ranks
-- @param[opt=1] scale number, the factor of the sums (f32): 1 / vx.dist.size() gives the mean
-- @return x
-- @raise where x is none of these, an i32 sum does not fit, or a rank does not come or comes with another shape
function dist.all_reduce(x, scale)
  joined()
  core.expect_writable(expect_tensor("all_reduce", x), "all_reduce")
  core.rank_reduce(x, scale or 1)
  return x
end

--- Collects the tensors of all ranks. Collective.
-- @param x tensor of any dtype and shape, contiguous, the same shape on all ranks
-- @return tensor (size, ...): that of rank r at r + 1 along the first dimension
-- @raise where x is no such tensor, or a rank does not come or comes with another shape
function dist.all_gather(x)
  local shape = expect_tensor("all_gather", x):shape()
  table.insert(shape, 1, joined().size)
  local all = core.new(shape, { dtype = x:dtype(), device = x:device() })
  core.rank_gather(all, core.contiguous(x))
  return all
end

--- Collects rows from all ranks, which may have different numbers of them. Collective.
-- @param x tensor (N, ...), its rows of the same shape on all ranks
-- @return tensor (sum of N, ...) without a gradient: the rows in the order of the ranks; for one rank x itself
-- @raise where x is no such tensor, or a rank does not come or comes with other rows
function dist.gather_rows(x)
  if joined().size == 1 then return expect_tensor("gather_rows", x) end
  local shape, most, counts = x:shape(), 0, {}
  for r, n in ipairs(dist.gather { shape[1] }) do
    counts[r], most = n[1], math.max(most, n[1])
  end
  local padded = core.contiguous(x:detach())
  if shape[1] < most then
    shape[1] = most
    padded = core.new(shape, { dtype = x:dtype(), device = x:device() })
    padded:narrow(1, 1, x:size(1)):copy(x)
  end
  local all, total, at = dist.all_gather(padded), 0, 1
  for _, n in ipairs(counts) do total = total + n end
  shape[1] = total
  local rows = core.new(shape, { dtype = x:dtype(), device = x:device() })
  for r, n in ipairs(counts) do
    if n > 0 then rows:narrow(1, at, n):copy(all:select(1, r):narrow(1, 1, n)) end
    at = at + n
  end
  return rows
end

--- Overwrites a tensor with that of one rank. Collective.
-- @param x tensor of any dtype and shape, contiguous, the same shape on all ranks
-- @param[opt=0] root number of the rank whose elements all get, 0-based
-- @return x
-- @raise where x is no such tensor, root is no rank, or a rank does not come or comes with another shape
function dist.broadcast(x, root)
  joined()
  core.expect_writable(expect_tensor("broadcast", x), "broadcast")
  core.rank_broadcast(x, check.integer("broadcast", "root", root or 0, 0))
  return x
end

--- Waits until all ranks are here. Collective.
-- @raise where a rank does not come
function dist.barrier()
  joined()
  core.rank_barrier()
end

--- Ends all ranks within about two seconds, those that hang too. A single process goes on.
-- @param[opt=1] code integer, the status of the job, 1 to 255
-- @raise where there is a launcher's job that cannot be joined
function dist.abort(code)
  joined()
  core.rank_abort(code or 1)
end

--- Leaves the job: the last call of every rank, where nothing has failed. From then on this process is the only rank.
-- Collective.
-- @raise where a rank does not come
function dist.close()
  if joined().size > 1 then core.rank_hold_interrupts(false) end
  core.rank_close()
  me.size = 1
end

-- -- Numbers ----------------------------------------------------------------------------------------------------------

--- Sums numbers over the ranks. With them goes whether Ctrl-C came: from the exchange on in which it does,
-- core.interrupted() is true on all ranks. Collective.
-- @param values array of numbers, as many on all ranks
-- @return array of their sums
-- @raise where a rank does not come, or comes with another count
function dist.sum(values)
  local m = joined()
  if m.size == 1 then return values end
  local list = { core.rank_interrupted() and 1 or 0, m.rank == 0 and core.time() or 0 }
  for i, v in ipairs(values) do list[i + 2] = v end
  local sums = core.rank_sum(list)
  if sums[1] > 0 then core.rank_agree() end
  m.clock = sums[2]
  local totals = {}
  for i = 1, #values do totals[i] = sums[i + 2] end
  return totals
end

--- Collects numbers from the ranks. Collective.
-- @param values array of numbers, as many on all ranks
-- @return array of the ranks' arrays, that of rank r at r + 1
-- @raise where a rank does not come, or comes with another count
function dist.gather(values) return core.rank_lists(values, joined().size) end

--- Collects texts from the ranks. Collective.
-- @param text text of this rank
-- @return array of texts, that of rank r at r + 1
-- @raise where a rank does not come
function dist.gather_text(text)
  if joined().size == 1 then return { text } end
  local most, lengths = 0, dist.gather { #text }
  for _, n in ipairs(lengths) do most = math.max(most, n[1]) end
  local bytes = {}
  for i = 1, #text do bytes[i] = text:byte(i) end
  for i = #text + 1, most do bytes[i] = 0 end
  local texts = {}
  for r, list in ipairs(dist.gather(bytes)) do
    local parts = {}
    for i = 1, lengths[r][1] do parts[i] = string.char(list[i]) end
    texts[r] = table.concat(parts)
  end
  return texts
end

--- Reads a clock that all ranks agree on: that of rank 0 at the last exchange of numbers.
-- @return seconds since a moment that stays the same
-- @raise as rank
function dist.time() return joined().size == 1 and core.time() or me.clock end

--- Gives a seed of this rank's own: what every rank draws for its own rows comes from streams of their own. Rank 0
-- keeps the seed.
-- @param seed integer from 0 to 2^53
-- @return integer from 0 to 2^53
-- @raise as rank
function dist.seed(seed) return (seed + joined().rank * 0x9E3779B97F) % 2 ^ 53 end

--- Gives a generator whose streams are this rank's own: for noise on a rank's own rows. What all ranks must draw alike
-- (parameters, vertices) comes from the generator itself.
-- @param generator vx.generator
-- @return generator that advances the given one; that one itself on one rank
-- @raise as rank
function dist.generator(generator)
  if joined().size == 1 then return generator end
  return { of = generator, stream = function()
    local seed, stream = generator:stream()
    return dist.seed(seed), stream
  end }
end

-- -- Parameters -------------------------------------------------------------------------------------------------------

--- The tensors of a table in the order of their names.
local function in_order(tensors)
  local names, list = {}, {}
  for name in pairs(tensors) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do list[i] = tensors[name] end
  return list
end

--- Overwrites tensors with those of rank 0. Collective.
-- @param tensors table { name = tensor of any shape }, as a module's state_dict gives it; the same names on all ranks
-- @raise where a rank does not come, or comes with another shape
function dist.broadcast_all(tensors)
  if joined().size == 1 then return end
  for _, x in ipairs(in_order(tensors)) do
    core.expect_writable(x, "broadcast_all")
    core.rank_broadcast(x, 0)
  end
end

--- Fails unless tensors have the same bytes on all ranks. Collective.
-- @param tensors table { name = tensor of any shape }
-- @param what text: what they are, for the error
-- @raise where they differ, with the ranks whose do
function dist.expect_same(tensors, what)
  if joined().size == 1 then return end
  local hashes, others = dist.gather { core.rank_hash(in_order(tensors)) }, {}
  for r = 2, me.size do
    if hashes[r][1] ~= hashes[1][1] or hashes[r][2] ~= hashes[1][2] then others[#others + 1] = r - 1 end
  end
  if #others > 0 then
    fail("%s of rank %s %s those of rank 0", what, table.concat(others, ", "), "are no longer")
  end
end

-- -- Gradients --------------------------------------------------------------------------------------------------------

local LEAST, MOST = 2 ^ 14, 2 ^ 18 -- elements of a bucket: 64 KB, 1 MB
local ALIGN = 16      -- elements: 64 bytes

local Gradients = {}
Gradients.__index = Gradients

--- Lays the gradients of parameters out in buckets, the last parameters first, as backward comes to them.
local function make_buckets(parameters, most)
  local buckets, bucket = {}, nil
  for i = #parameters, 1, -1 do
    local p = parameters[i]
    local n = math.ceil(p:numel() / ALIGN) * ALIGN
    if not bucket or bucket.count + n > most or bucket.device ~= p:device() then
      bucket = { count = 0, leaves = {}, device = p:device() }
      buckets[#buckets + 1] = bucket
    end
    bucket.leaves[#bucket.leaves + 1] = { parameter = p, index = i, offset = bucket.count }
    bucket.count = bucket.count + n
  end
  return buckets
end

--- Gives a bucket memory of its own, a view of it to each leaf. It gets other memory where a loss reads this, as of a
-- gradient of the pass before: on its way it changes before backward is over.
local function give_memory(bucket)
  bucket.flat = core.new({ bucket.count }, { device = bucket.device, keep = true }):zero()
  for _, leaf in ipairs(bucket.leaves) do
    local shape, strides, step = leaf.parameter:shape(), {}, 1
    for d = #shape, 1, -1 do strides[d], step = step, step * shape[d] end
    leaf.view = core.keep(core.view(bucket.flat, shape, strides, leaf.offset))
    tape.set_buffer(leaf.parameter, leaf.view, function() give_memory(bucket) end)
  end
end

--- Makes what averages the gradients of parameters over the ranks. They lie in flat buckets of at most 1 MB; a bucket
-- starts on its way as soon as backward has made all of it. The gradient of a parameter that a rank's loss does not
-- depend on counts as 0; one that no rank's does stays nil.
-- @param parameters array of tensors f32 of any shape that require a gradient, the same on all ranks
-- @param[opt] options table
-- @param[opt] options.bucket number of elements in a bucket; a quarter of all, from 2^14 to 2^18
-- @return gradients with :backward(loss)
-- @raise where parameters is no array of such tensors
function dist.gradients(parameters, options)
  local m = joined()
  local self = setmetatable({ size = m.size, parameters = parameters }, Gradients)
  for i, p in ipairs(parameters) do
    if not core.is_tensor(p) or not p.requires_grad then fail("gradients: parameter %d is none", i) end
  end
  if m.size == 1 then return self end
  local total = 0
  for _, p in ipairs(parameters) do total = total + p:numel() end
  local most = options and options.bucket or math.max(LEAST, math.min(MOST, math.ceil(total / 4)))
  self.buckets, self.leaf_of = make_buckets(parameters, most), {}
  for _, bucket in ipairs(self.buckets) do
    for _, leaf in ipairs(bucket.leaves) do
      leaf.bucket, self.leaf_of[leaf.parameter], leaf.parameter.grad = bucket, leaf, nil
    end
    give_memory(bucket)
  end
  self.final = function(leaf) self:finish_leaf(leaf) end
  return self
end

--- Starts the buckets that are whole, in their order: it has to be the same on all ranks.
local function start_whole(self)
  while self.buckets[self.next] and self.buckets[self.next].missing == 0 do
    local bucket = self.buckets[self.next]
    bucket.work = core.rank_begin(bucket.flat, 1 / self.size)
    self.next = self.next + 1
  end
end

--- Takes a gradient to its place, and its bucket on its way where that was the last. Called while backward runs.
-- @param leaf tensor f32 of any shape, a parameter whose gradient nothing more is added to; any other tensor is left
-- alone
function Gradients:finish_leaf(leaf)
  local own = self.leaf_of[leaf]
  if not own or own.there then return end
  if leaf.grad and leaf.grad ~= own.view then
    own.view:copy(leaf.grad)
    leaf.grad = own.view
  end
  if leaf.grad then
    own.there, own.bucket.missing = true, own.bucket.missing - 1
    start_whole(self)
  end
end

--- Computes the gradients of the parameters and averages them over the ranks: loss:backward() of the mean of the ranks'
-- losses. Collective.
-- @param loss tensor of one element; nil for a rank that has none, or where there are no parameters
-- @raise where a gradient is there already (call zero_grad first), loss:backward() raises, or a rank does not come
function Gradients:backward(loss)
  if loss and not loss.requires_grad then loss = nil end
  if self.size == 1 then return loss and loss:backward() end
  self.next = 1
  for _, bucket in ipairs(self.buckets) do bucket.missing, bucket.work = #bucket.leaves, nil end
  for p, leaf in pairs(self.leaf_of) do
    if p.grad then fail "gradients: a parameter has a gradient already; call zero_grad before" end
    leaf.there = false
  end
  if loss then tape.watched(self.final, core.rank_progress, loss.backward, loss) end
  local there = {}
  for i = 1, #self.parameters do
    local own = self.leaf_of[self.parameters[i]]
    if not own.there then
      own.view:zero()
      own.bucket.missing = own.bucket.missing - 1
    end
    there[i] = own.there and 1 or 0
  end
  start_whole(self)
  there = dist.sum(there)
  for _, bucket in ipairs(self.buckets) do core.rank_end(bucket.work) end
  for i, p in ipairs(self.parameters) do p.grad = there[i] > 0 and self.leaf_of[p].view or nil end
end

return dist
