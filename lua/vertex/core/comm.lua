--- core/comm.lua: the ranks of a job as C joins them. What users call is lua/vertex/dist.lua.

local ffi = require "ffi"
local handle = require("vertex.core.op").handle
local library = require "vertex.core.library"

local C, call = library.C, library.call

local comm = {}

--- Joins the job that a launcher started; raises why that cannot be.
function comm.rank_open() call(C.vx_comm_open) end

--- Gives the number of this process among the ranks, 0-based, and how many there are.
function comm.rank_numbers() return C.vx_comm_rank(), C.vx_comm_size() end

--- Names what joins the ranks.
function comm.rank_group() return ffi.string(C.vx_comm_name()) end

--- Sums x over the ranks, in place, times scale.
function comm.rank_reduce(x, scale) call(C.vx_comm_all_reduce, handle(x), scale) end

--- Fills `all` (ranks, ...) with the x of all.
function comm.rank_gather(all, x) call(C.vx_comm_all_gather, handle(all), handle(x)) end

--- Overwrites x with that of rank root.
function comm.rank_broadcast(x, root) call(C.vx_comm_broadcast, handle(x), root) end

--- Waits for all ranks.
function comm.rank_barrier() call(C.vx_comm_barrier) end

--- Ends all ranks; returns only for a single one.
function comm.rank_abort(code) C.vx_comm_abort(code) end

--- Leaves the job, when all do.
function comm.rank_close() call(C.vx_comm_close) end

local function to_doubles(list)
  local array = ffi.new("double[?]", math.max(1, #list))
  for i, v in ipairs(list) do array[i - 1] = v end
  return array
end

--- Sums an array of numbers over the ranks; gives a new one.
function comm.rank_sum(list)
  local array, sums = to_doubles(list), {}
  call(C.vx_comm_sum, array, #list)
  for i = 1, #list do sums[i] = array[i - 1] end
  return sums
end

--- Gives the arrays of numbers of all ranks, which are of one length.
function comm.rank_lists(list, size)
  local n = #list
  local all, lists = ffi.new("double[?]", math.max(1, n * size)), {}
  call(C.vx_comm_gather, all, to_doubles(list), n)
  for r = 1, size do
    lists[r] = {}
    for i = 1, n do lists[r][i] = all[(r - 1) * n + i - 1] end
  end
  return lists
end

--- Makes -1 of what is not among the best of all ranks' candidates (core/comm/comm.h).
function comm.rank_choose(near, best, keys, rank)
  call(C.vx_comm_choose, handle(near), handle(best), handle(keys), rank)
end

local work_out = ffi.new "vx_comm_work *[1]"

--- Begins to sum x over the ranks, in place; gives what rank_end waits for.
function comm.rank_begin(x, scale)
  call(C.vx_comm_begin, work_out, handle(x), scale)
  return work_out[0]
end

--- Moves what is under way.
function comm.rank_progress() C.vx_comm_progress() end

--- Waits for what rank_begin began.
function comm.rank_end(work) call(C.vx_comm_end, work) end

--- Gives two numbers below 2^32 that stand for the bytes of tensors.
function comm.rank_hash(tensors)
  local hash = ffi.new("uint64_t[1]", 1)
  for _, x in ipairs(tensors) do call(C.vx_comm_hash, hash, handle(x)) end
  return tonumber(hash[0] / 2 ^ 32), tonumber(hash[0] % 2 ^ 32)
end

--- Says where this process runs: { host, mask } as numbers, cores it may use, cores of the machine.
function comm.rank_place()
  local place = ffi.new "vx_place_of_rank"
  call(C.vx_comm_place, place)
  return { place.host, place.mask, place.allowed, place.cores }
end

--- Lets core.interrupted() tell what the ranks agreed on, not what this process got.
function comm.rank_hold_interrupts(on) call(C.vx_interrupt_hold, on and 1 or 0) end

--- Says whether this process itself got Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP.
function comm.rank_interrupted() return C.vx_interrupt_raised() ~= 0 end

--- Makes core.interrupted() true.
function comm.rank_agree() C.vx_interrupt_agree() end

return comm
