--- The paper's tables and the questions beside them, as records that reproduce.lua runs. Everything here is meant to be
-- changed.
--
-- A group of runs, what one command of a sweep makes:
--   weight       its share of the minutes, beside those of the others
--   program      of experiments/, without .lua
--   methods      those worth most first: where minutes are few the last are left out, but `keep` of them
--   grid         { name, values, minutes = { [value] = minutes from which on it is tried } }, as --grid; a run a value
-- A study:
--   question     a sentence
--   of           the group of runs that it looks at; or
--   measure      function(seconds) → rows, for those that train nothing, with its weight
--   x            name of the grid, the horizontal axis; nil: the methods are
--   plots        { column, label, ylog = }, a plot each; xlog for all of them
--   columns      of the table, { name, title }
--   sentences    function(rows) → three texts, computed from the rows alone
-- A row: { label, method, x = number or nil, values = { column = mean }, sd = { column = deviation over seeds },
-- hidden = true where the table leaves it out }.

local vx = require "vertex"
local core = require "vertex.core"

-- -- Words for numbers ------------------------------------------------------------------------------------------------

local function percent(v) return v and ("%.1f %%"):format(100 * v) or "–" end
local function number(v) return v and ("%.3g"):format(v) or "–" end

--- "rises from 1 to 2", "falls ...", "stays at 1": the same where they differ by less than a fiftieth.
local function course(from, to, show)
  if math.abs(to - from) <= 0.02 * math.max(math.abs(from), math.abs(to)) then return "stays at " .. show(from) end
  return ("%s from %s to %s"):format(to > from and "rises" or "falls", show(from), show(to))
end

local function where(rows, test)
  local list = {}
  for _, row in ipairs(rows) do
    if test(row) then list[#list + 1] = row end
  end
  return list
end

local function of_methods(rows, pattern) return where(rows, function(row) return row.method:find(pattern) end) end

local function mean(rows, column)
  local sum, n = 0, 0
  for _, row in ipairs(rows) do
    if row.values[column] then sum, n = sum + row.values[column], n + 1 end
  end
  return n > 0 and sum / n or nil
end

--- The row whose column is least, or greatest where sign is -1.
local function extreme(rows, column, sign)
  local best
  for _, row in ipairs(rows) do
    local v = row.values[column]
    if v and (not best or (sign or 1) * v < (sign or 1) * best.values[column]) then best = row end
  end
  return best
end

--- "97.3 % at K = 1, 99 % at K = 2": a column of all rows.
local function listed(rows, column, name, show)
  local parts = {}
  for i, row in ipairs(rows) do parts[i] = ("%s at %s = %s"):format(show(row.values[column]), name, number(row.x)) end
  return table.concat(parts, ", ")
end

--- What the largest difference of a column is beside the spread over seeds, where there are seeds.
local function beside_seeds(rows, column)
  local low, high, spread = extreme(rows, column), extreme(rows, column, -1), 0
  for _, row in ipairs(rows) do spread = math.max(spread, row.sd[column] or 0) end
  if spread == 0 then return "" end
  local difference = high.values[column] - low.values[column]
  return (", a difference of %.1f standard deviations over seeds"):format(difference / spread)
end

-- -- What trains nothing ----------------------------------------------------------------------------------------------

local function norm(x) return math.sqrt(x:square():sum():item()) end

--- One row on the great circle from a vertex's code to another code, and the gradients of its deviation from the vertex
-- at the row, at the codebook and at the probabilities.
local function measure_gradient()
  local M, D, tau, steps, rows = 64, 32, 0.1, 60, {}
  vx.step(function()
    local function unit(x) return x / x:square():sum(2, true):sqrt() end
    local book = unit(vx.randn({ M, D }, { generator = vx.generator(1) }))
    local from, to = book:narrow(1, 1, 1), book:narrow(1, 2, 1)
    local across = unit(to - from * (from * to):sum():item())
    local onehot = {}
    for m = 1, M do onehot[m] = m == 1 and 1 or 0 end
    local vertex = vx.tensor { onehot }
    local deviation = { ["knn-ce"] = function(p) return -(p:narrow(2, 1, 1):log():sum()) end,
      ["knn-l2"] = function(p) return (vertex - p):square():sum() end }
    for i = 0, steps do
      local angle = i / steps * math.pi / 2
      local z0 = from * math.cos(angle) + across * math.sin(angle)
      for _, method in ipairs { "knn-ce", "knn-l2" } do
        local function leaf(x)
          local y = x:detach():clone()
          y.requires_grad = true
          return y
        end
        local z, q = leaf(z0), leaf(book)
        local p = vx.softmax(vx.matmul(unit(z), unit(q):transpose(1, 2)) / tau)
        deviation[method](p):backward()
        local at = leaf(p)
        deviation[method](at):backward()
        local way = from - z0 * math.cos(angle) -- along the sphere, from the row to the code
        local length = norm(way) * norm(z.grad)
        rows[#rows + 1] = { label = ("p = %.3g"):format(p:narrow(2, 1, 1):item()), method = method, sd = {},
          x = p:narrow(2, 1, 1):item(), hidden = i % 10 ~= 0 or nil,
          values = { distance = norm(vertex - p), grad_z = norm(z.grad), grad_codebook = norm(q.grad),
            grad_p = norm(at.grad), toward = length > 1e-12 and -(z.grad * way):sum():item() / length or nil } }
      end
    end
  end)
  return rows
end

--- Time and memory of the smoothed quantizer, forward and backward, with rows as many as K vertices ask for; twice as
-- many codes each time, as long as seconds last.
local function measure_cost(seconds)
  local rows, K, began = {}, 4, core.time()
  for i, D in ipairs { 3, 32 } do
    local M, last = 128, 0
    repeat
      M = 2 * M
      local quantizer = vx.quantizer("softmax-knn-ce", { dim = D, codes = M, k = K, seed = 1 })
      quantizer.with_stats = false
      local z = vx.keep(vx.randn({ K * M, D }, { requires_grad = true }))
      local function step()
        vx.step(function()
          local o = quantizer(z)
          local loss = o.quantized:square():mean() + o.reg
          loss:backward()
        end)
      end
      if last == 0 then step() end -- what is made once
      vx.reset_peak()
      local before = vx.memory().live
      local start = core.time()
      step()
      last = core.time() - start
      rows[#rows + 1] = { label = "M = " .. M, method = "D = " .. D, x = M, sd = {}, values = { codes = M, width = D,
        seconds = last, megabytes = (vx.memory().peak - before) / 1e6, array = 4 * K * M * M / 1e6 } }
      z:release()
    until M >= 65536 or M >= 512 and core.time() - began + 5 * last > seconds * i / 2
  end
  return rows
end

--- The exponent a of y ~ x^a between the smallest and the largest row.
local function exponent(rows, column)
  local first, last = rows[1], rows[#rows]
  return math.log(last.values[column] / first.values[column]) / math.log(last.x / first.x)
end

-- -- The runs ---------------------------------------------------------------------------------------------------------

local KNN_CE = { "softmax-knn-ce" }
local ALL = { "softmax-knn-ce", "ste-euclid", "softmax-ppl", "softmax-knn-l2", "ste-cosine", "hgumbel-knn-ce",
  "hgumbel-ppl", "sgumbel-knn-ce", "re-euclid", "hgumbel-knn-l2", "sgumbel-knn-l2", "sgumbel-ppl", "re-cosine" }

local runs = {
  table1 = { weight = 50, program = "ae_sweep", methods = ALL, keep = 13 },
  table2 = { weight = 20, program = "w2v_sweep", methods = ALL, keep = 4 },
  k = { weight = 6, program = "ae_sweep", methods = KNN_CE, grid = { "k", { 1, 2, 4, 8 } } },
  tightness = { weight = 8, program = "ae_sweep", methods = { "softmax-knn-ce", "softmax-ppl" }, keep = 2,
    grid = { "tau", { 0.03, 0.1, 0.3 } } },
  subset = { weight = 3, program = "ae_sweep", methods = KNN_CE, grid = { "vertices", { 0.25, 1 } } },
  shards = { weight = 4, program = "ae_sweep", methods = KNN_CE, grid = { "shards", { 1, 2, 4 } } },
  ["codebook-size"] = { weight = 6, program = "ae_sweep", methods = KNN_CE,
    grid = { "codes", { 64, 256, 1024, 4096, 16384, 65536 }, minutes = { [16384] = 15, [65536] = 60 } } },
}

-- -- The studies ------------------------------------------------------------------------------------------------------

local CODE_USE, RMSE = { "code_use", "code use" }, { "rmse", "rMSE" }
local UNSELECTED = { "unselected", "rows that no vertex selects" }
local CONTESTED = { "contested", "vertices that share a row" }

local studies = {
  { name = "table1", title = "Table 1: discrete autoencoding", of = "table1",
    question = "Which quantizers use their codes, and what do images lose by them?",
    plots = { CODE_USE, RMSE },
    columns = { CODE_USE, { "perplexity", "perplexity" }, RMSE, { "rmse_soft", "rMSE soft" }, { "psnr", "PSNR" } },
    sentences = function(rows)
      local knn, ste = of_methods(rows, "%-knn%-"), of_methods(rows, "^ste%-")
      local least, most = extreme(knn, "code_use"), extreme(ste, "code_use", -1)
      local a, b = least.values.code_use, most.values.code_use
      local best, soft, ce = extreme(rows, "rmse"), of_methods(rows, "^softmax%-ppl")[1],
        of_methods(rows, "^softmax%-knn%-ce")[1]
      return {
        ("KNN-regularized methods use %s of the codes on average and %s at least (%s), straight-through ones %s on "
          .. "average and %s at most (%s): %s."):format(percent(mean(knn, "code_use")), percent(a), least.method,
          percent(mean(ste, "code_use")), percent(b), most.method, a > b and "every one of the former uses more, as in "
          .. "the paper" or mean(knn, "code_use") > mean(ste, "code_use") and "the former use more on average, but not "
          .. "each of them" or "the former do not use more, unlike in the paper"),
        soft and ce and ("Hard codes in place of soft ones take the rMSE of softmax-ppl from %s to %s and that of "
          .. "softmax-knn-ce from %s to %s: the perplexity regularizer's gap is %s."):format(
          number(soft.values.rmse_soft), number(soft.values.rmse), number(ce.values.rmse_soft), number(ce.values.rmse),
          soft.values.rmse - soft.values.rmse_soft > ce.values.rmse - ce.values.rmse_soft and "the larger"
          or "not the larger") or "Without softmax-ppl and softmax-knn-ce nothing is seen of the soft-to-hard gap.",
        ("The least rMSE has %s, %s, with %s of its codes in use."):format(best.method, number(best.values.rmse),
          percent(best.values.code_use)),
      }
    end },

  { name = "table2", title = "Table 2: Wav2Vec 2.0 pretraining", of = "table2",
    question = "Which quantizers use their codes where the codebook's collapse makes the loss the smaller?",
    plots = { CODE_USE, { "equal", "distractors equal to the target" } },
    columns = { CODE_USE, { "perplexity", "perplexity" }, { "accuracy", "accuracy" }, { "loss", "loss, nats" },
      { "equal", "equal" } },
    sentences = function(rows)
      local ce, hard = of_methods(rows, "%-knn%-ce$"), of_methods(rows, "^[sr]t?e%-")
      local a, b, worst = mean(ce, "code_use"), mean(hard, "code_use"), extreme(rows, "equal", -1)
      local low = extreme(rows, "loss")
      return {
        a and b and ("KNN-CE methods use %s of the codes on average, straight-through and rotation methods %s: %s.")
          :format(percent(a), percent(b), a > b and "more, as in the paper" or "not more, unlike in the paper")
          or "Too few methods are finished to compare their code use.",
        ("Most distractors equal their target with %s, %s: its codebook %s."):format(worst.method,
          percent(worst.values.equal), worst.values.equal > 0.5 and "has collapsed, which the loss cannot see"
          or "has not collapsed"),
        ("The least loss has %s, %s nats with %s of its codes in use."):format(low.method, number(low.values.loss),
          percent(low.values.code_use)),
      }
    end },

  { name = "k", title = "K, the neighbours of a vertex", of = "k", x = "k", xlog = true,
    question = "How does the number of neighbours pulled toward each vertex matter?",
    plots = { CODE_USE, RMSE, UNSELECTED },
    columns = { CODE_USE, RMSE, { "rmse_soft", "rMSE soft" }, { "tightness", "mean max p" }, UNSELECTED },
    sentences = function(rows)
      local first, last, best = rows[1], rows[#rows], extreme(rows, "rmse")
      return {
        ("Code use is %s: from the smallest K to the largest it %s."):format(listed(rows, "code_use", "K", percent),
          course(first.values.code_use, last.values.code_use, percent)),
        ("The least rMSE, %s, is that of K = %d%s."):format(number(best.values.rmse), best.x,
          beside_seeds(rows, "rmse")),
        ("The share of rows that no vertex selects %s, the mean largest probability %s."):format(
          course(first.values.unselected, last.values.unselected, percent),
          course(first.values.tightness, last.values.tightness, number)),
      }
    end },

  { name = "tightness", title = "Tightness of the smoothing", of = "tightness", x = "tau", xlog = true,
    question = "How near do rows come to vertices from several starting temperatures τ, and what do hard codes cost?",
    plots = { { "tightness_q05", "max p, 5 % of the rows below" }, { "tightness_q50", "max p, median" },
      { "gap", "soft-to-hard gap ‖e - p‖²" } },
    columns = { { "tightness_q05", "max p, 5 %" }, { "tightness_q50", "median" }, { "tightness_q95", "95 %" },
      { "gap", "gap" }, { "rmse_soft", "rMSE soft" }, RMSE },
    sentences = function(rows)
      local knn, ppl = of_methods(rows, "knn"), of_methods(rows, "ppl")
      local a, b = mean(knn, "tightness_q50"), mean(ppl, "tightness_q50")
      local low, high = extreme(knn, "tightness_q50"), extreme(knn, "tightness_q50", -1)
      local function rise(of) return mean(of, "rmse") - mean(of, "rmse_soft") end
      return {
        ("The median of max p is %s under softmax-knn-ce and %s under softmax-ppl, means over τ: the KNN regularizer "
          .. "%s."):format(number(a), number(b), a > b and "smooths tighter" or "does not smooth tighter"),
        ("Under softmax-knn-ce it lies between %s (τ = %s at the start) and %s (τ = %s)."):format(
          number(low.values.tightness_q50), number(low.x), number(high.values.tightness_q50), number(high.x)),
        ("Hard codes add %s to the rMSE of softmax-knn-ce and %s to that of softmax-ppl; their gaps ‖e - p‖² are "
          .. "%s and %s."):format(number(rise(knn)), number(rise(ppl)), number(mean(knn, "gap")),
          number(mean(ppl, "gap"))),
      }
    end },

  { name = "gradient", title = "KNN-L2 and KNN-CE at gradient level", weight = 1, measure = measure_gradient,
    question = "What gradient does a selected row get, as a function of its probability p of the vertex?",
    x = "p of the vertex", xlog = true,
    plots = { { "grad_z", "gradient at the row z", ylog = true }, { "grad_codebook", "at the codebook", ylog = true },
      { "grad_p", "at the probabilities", ylog = true } },
    columns = { { "distance", "‖e - p‖" }, { "grad_z", "‖dz‖" }, { "grad_codebook", "‖dQ‖" }, { "grad_p", "‖dp‖" },
      { "toward", "cosine of -dz and the way to the code" } },
    sentences = function(rows)
      local ce, l2 = of_methods(rows, "ce"), of_methods(rows, "l2")
      local far_ce, far_l2, peak = ce[#ce], l2[#l2], extreme(l2, "grad_z", -1)
      local ratio = far_ce.values.grad_z / far_l2.values.grad_z
      return {
        ("Of a row far from its vertex (p = %s) the gradient at the row is %s under CE and %s under L2, %s times "
          .. "as large: %s."):format(number(far_l2.x), number(far_ce.values.grad_z), number(far_l2.values.grad_z),
          number(ratio), ratio > 2 and "L2 hardly moves the rows that a lost code would need"
            or "the two hardly differ"),
        ("L2's gradient is largest at p = %s, and at the codebook, far away, %s of CE's."):format(number(peak.x),
          percent(far_l2.values.grad_codebook / far_ce.values.grad_codebook)),
        ("There CE's is %s times as large as L2's at the probabilities themselves, and the cosine between the step of "
          .. "the row and its way to the code is %s under CE, %s under L2."):format(
          number(far_ce.values.grad_p / far_l2.values.grad_p), number(far_ce.values.toward),
          number(far_l2.values.toward)),
      }
    end },

  { name = "unselected", title = "Rows that no vertex selects", of = "k", x = "k", xlog = true,
    question = "How many rows does the regularizer leave alone, whom do vertices share, and what becomes of such rows?",
    plots = { UNSELECTED, CONTESTED, { "tightness_q05", "max p, 5 % of the rows below" } },
    columns = { UNSELECTED, CONTESTED, { "tightness_q05", "max p, 5 %" },
      { "tightness_q50", "median" }, { "gap", "gap" } },
    sentences = function(rows)
      local first, last = rows[1], rows[#rows]
      local fewest = extreme(rows, "unselected")
      return {
        ("No vertex selects %s of the rows; fewest at K = %d."):format(listed(rows, "unselected", "K", percent),
          fewest.x),
        ("The share of vertices one of whose neighbours another claims %s."):format(
          course(first.values.contested, last.values.contested, percent)),
        ("Meanwhile the largest probability that 5 %% of the rows stay below %s and the median %s: rows that are left "
          .. "alone %s."):format(course(first.values.tightness_q05, last.values.tightness_q05, number),
          course(first.values.tightness_q50, last.values.tightness_q50, number),
          first.values.tightness_q05 < last.values.tightness_q05 and "stay further from the vertices"
          or "are drawn to vertices all the same, by the codes and τ that the others moved"),
      }
    end },

  { name = "subset", title = "A subset of the vertices", of = "subset", x = "vertices",
    question = "Is it enough to look at a quarter of the vertices each step (section 5.3)?",
    plots = { CODE_USE, RMSE, { "step_ms", "ms a step" } },
    columns = { CODE_USE, { "perplexity", "perplexity" }, RMSE, { "step_ms", "ms a step" }, UNSELECTED },
    sentences = function(rows)
      local few, all = rows[1], rows[#rows]
      return {
        ("With %s of the vertices each step code use is %s, with all of them %s: %s."):format(percent(few.x),
          percent(few.values.code_use), percent(all.values.code_use),
          few.values.code_use >= 0.95 * all.values.code_use and "the subset keeps the codes in use"
          or "the subset does not keep the codes in use"),
        ("rMSE %s from the subset to all%s."):format(course(few.values.rmse, all.values.rmse, number),
          beside_seeds(rows, "rmse")),
        ("A step takes %s ms with the subset and %s ms with all."):format(number(few.values.step_ms),
          number(all.values.step_ms)),
      }
    end },

  { name = "cost", title = "Memory and time", weight = 3, measure = measure_cost, x = "codes M", xlog = true,
    question = "What does softmax-knn-ce cost alone, forward and backward, with K·M rows for K = 4?",
    plots = { { "seconds", "seconds a step", ylog = true }, { "megabytes", "MB beyond the inputs", ylog = true } },
    columns = { { "seconds", "s a step" }, { "megabytes", "MB" }, { "array", "MB of one N × M array" } },
    sentences = function(rows)
      local narrow, wide = of_methods(rows, "= 3$"), of_methods(rows, "= 32$")
      local last = wide[#wide]
      return {
        ("From M = %d to %d the time of rows of 3 grows as M to the %.2f, of rows of 32 (to %d) to the %.2f: %s than "
          .. "the 2 of all pairs of rows and codes."):format(narrow[1].x, narrow[#narrow].x,
          exponent(narrow, "seconds"), last.x, exponent(wide, "seconds"),
          exponent(wide, "seconds") < 2 and "less" or "not less"),
        ("Memory grows as M to the %.2f and %.2f."):format(exponent(narrow, "megabytes"), exponent(wide, "megabytes")),
        ("At M = %d and D = 32 a step takes %s s and %s MB, %s of a single array of all probabilities."):format(last.x,
          number(last.values.seconds), number(last.values.megabytes),
          percent(last.values.megabytes / last.values.array)),
      }
    end },

  { name = "shards", title = "Shards: the paper's several GPUs", of = "shards", x = "shards",
    question = "Does it matter that each GPU takes K / shards neighbours among its own rows?",
    plots = { CODE_USE, RMSE, UNSELECTED },
    columns = { CODE_USE, { "perplexity", "perplexity" }, RMSE, UNSELECTED, CONTESTED },
    sentences = function(rows)
      local first, last = rows[1], rows[#rows]
      return {
        ("Code use is %s: over the shards it %s."):format(listed(rows, "code_use", "shards", percent),
          course(first.values.code_use, last.values.code_use, percent)),
        ("rMSE %s%s."):format(course(first.values.rmse, last.values.rmse, number), beside_seeds(rows, "rmse")),
        ("The share of rows that no vertex selects %s."):format(
          course(first.values.unselected, last.values.unselected, percent)),
      }
    end },

  { name = "codebook-size", title = "The codebook's size", of = "codebook-size", x = "codes", xlog = true,
    question = "How far does the codebook grow with all codes in use?",
    plots = { CODE_USE, RMSE, { "step_ms", "ms a step" } },
    columns = { CODE_USE, { "perplexity", "perplexity" }, { "perplexity_share", "of even use" }, RMSE,
      { "step_ms", "ms a step" }, UNSELECTED },
    sentences = function(rows)
      local full, best = where(rows, function(row) return row.values.code_use >= 0.95 end), extreme(rows, "rmse")
      local first, last = rows[1], rows[#rows]
      return {
        #full > 0 and ("The largest codebook with 95 %% of its codes in use has %d codes; the largest tried, %d, uses "
          .. "%s."):format(full[#full].x, last.x, percent(last.values.code_use))
          or ("No codebook has 95 %% of its codes in use; the smallest, %d, uses %s."):format(first.x,
            percent(first.values.code_use)),
        ("The least rMSE, %s, is that of %d codes%s."):format(number(best.values.rmse), best.x,
          beside_seeds(rows, "rmse")),
        ("From %d to %d codes the time of a step %s ms."):format(first.x, last.x,
          course(first.values.step_ms, last.values.step_ms, number)),
      }
    end },
}

return { runs = runs, studies = studies }
