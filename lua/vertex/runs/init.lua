--- runs: the pieces around a training loop, which itself stays in the experiment: command line, output folder,
-- checkpoints and resuming, logs, progress, the table of results. Nothing in here knows what is trained, or on what.
--
-- An experiment of any modality is one file. It declares itself (the head of runs/experiment.lua says how) and shows
-- its model and its loop:
--
--     local run = vx.runs.start({ name = "mine", summary = "...",
--       presets = { tiny = { steps = 100 } }, preset = "tiny",
--       columns = { { name = "error", title = "Error", format = "%.3f", better = "low", from = "test rows" } } }, arg)
--     os.exit(run:each(function(method)
--       ...                                                -- make model and optimizer
--       local meter = vx.runs.meter()                      -- what a log line tells of the steps since the last
--       local now = run:begin(method, { model = model, optimizer = optimizer, sums = { meter = meter } })
--       for step = now.step + 1, run.config.steps do
--         ...                                              -- a step; run:log { step = step, loss = ... } at times
--         run:save({ step = step }, true)                  -- every --checkpoint seconds
--       end
--       return { steps = run.config.steps, error = ... }   -- nil where Ctrl-C came: core.interrupted()
--     end), true)
--
-- experiments/ae_sweep.lua is the full example.

local flags = require "vertex.runs.flags"
local sweep = require "vertex.runs.sweep"

return {
  start = sweep.start, Run = sweep.Run, quantizer_options = sweep.quantizer_options,
  fingerprint = sweep.fingerprint,
  meter = require "vertex.runs.meter",
  progress = require "vertex.runs.progress",
  checkpoint = require "vertex.runs.checkpoint",
  restore = require "vertex.runs.restore",
  curves = require "vertex.runs.curves",
  code_counts = require "vertex.runs.code_counts",
  code_maps = require "vertex.runs.code_maps",
  table = require "vertex.runs.table",
  compare = require "vertex.runs.compare",
  report = require "vertex.runs.report",
  flags = { graph = flags.graph, autocast = flags.autocast, integer = flags.integer, read = flags.read },
  make_folders = flags.make_folders, refuse = flags.refuse, reason = flags.reason, program = flags.program,
}
