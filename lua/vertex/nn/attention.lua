--- nn/attention.lua: multi-head attention as a layer.

local check = require "vertex.check"
local core = require "vertex.core"
local ops = require "vertex.ops"

local fail, shape_text = core.fail, core.shape_text

--- Adds the layer to nn.
return function(nn)
  --- Lets every time step of a sequence look at every other: queries, keys and values are projections of x, `heads` of
  -- width / heads numbers each, and what the heads have found is projected once more [Vaswani et al. 2017]. Its names
  -- are those of torchaudio's self-attention.
  -- @param width integer of 1 or more, elements of the last dimension of x and of the result
  -- @param heads integer of 1 or more, which divides width
  -- @param[opt] options { dropout = 0: share of the attention weights that training sets to 0; generator = vx.generator
  -- to draw from, the default one }
  -- @return module with k_proj, v_proj, q_proj and out_proj, each a Linear of width by width
  -- @raise where width or heads is no integer of 1 or more, heads does not divide width, or dropout is outside 0 .. 1
  nn.MultiHeadAttention = nn.module "MultiHeadAttention"
  function nn.MultiHeadAttention:init(width, heads, options)
    check.integer("MultiHeadAttention", "width", width, 1)
    check.integer("MultiHeadAttention", "heads", heads, 1)
    if width % heads ~= 0 then fail("MultiHeadAttention: %d heads do not divide a width of %d", heads, width) end
    local o = check.options("MultiHeadAttention", options, { dropout = { "any", 0 }, generator = "any" })
    self.width, self.heads, self.generator = width, heads, o.generator
    self.dropout = check.number("MultiHeadAttention", "dropout", o.dropout, 0, 1)
    for _, name in ipairs { "k_proj", "v_proj", "q_proj", "out_proj" } do self[name] = nn.Linear(width, width) end
  end

  --- Applies the layer.
  -- @param x tensor f32 (B, T, width)
  -- @param[opt] lengths tensor i32 (B), 0 .. T: steps at or beyond a row's length are not looked at
  -- @return tensor f32 (B, T, width)
  -- @raise where x has another shape, or a length is outside 0 .. T
  function nn.MultiHeadAttention:forward(x, lengths)
    if not core.is_tensor(x) or x:dim() ~= 3 or x:size(3) ~= self.width then
      fail("MultiHeadAttention: x is %s, expected a tensor (B,T,%d)",
        core.is_tensor(x) and shape_text(x) or "a " .. type(x), self.width)
    end
    local B, T = x:size(1), x:size(2)
    local function heads(projection) return projection(x):reshape { B, T, self.heads, self.width / self.heads } end
    local y = ops.attention(heads(self.q_proj), heads(self.k_proj), heads(self.v_proj), { lengths = lengths,
      dropout = self.training and self.dropout or 0, generator = self.generator })
    return self.out_proj(y:reshape { B, T, self.width })
  end

  --- Writes the sizes, for print.
  -- @return text
  function nn.MultiHeadAttention:summary()
    return ("%d in %d head%s%s"):format(self.width, self.heads, self.heads == 1 and "" or "s",
      self.dropout > 0 and (", dropout %g"):format(self.dropout) or "")
  end
end
