local plot = require "vertex.plot"

describe("plot", function()
  it("makes a PNG of scale pixels to the point", function()
    local png = plot.figure{width = 200, height = 100, scale = 3}:png()
    assert.equal("\137PNG\r\n\26\n", png:sub(1, 8))
  end)
end)
