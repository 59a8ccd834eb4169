rockspec_format = "3.0"
package = "vertex"
version = "scm-1"
source = { url = "git+https://localhost/vertex.git" } -- luarocks make builds the checkout it stands in
description = {
  summary = "Workbench for vector quantization in neural networks",
  detailed = "Tensors, kernels, quantizers and training loops in LuaJIT. Needs libjpeg, libpng, libsndfile, libsamplerate.",
  license = "MIT",
}
dependencies = { "lua == 5.1", "luafilesystem", "lua-cjson", "argparse" } -- LuaJIT is a Lua 5.1
external_dependencies = {
  JPEG = { header = "jpeglib.h" }, PNG = { header = "png.h" }, SNDFILE = { header = "sndfile.h" },
  SAMPLERATE = { header = "samplerate.h" },
}
build = {
  type = "cmake",
  variables = { CMAKE_BUILD_TYPE = "Release", CMAKE_INSTALL_PREFIX = "$(PREFIX)", VERTEX_LUADIR = "$(LUADIR)",
    VERTEX_LIBDIR = "$(LIBDIR)", VERTEX_CUDA = "OFF" },
}
deploy = { wrap_bin_scripts = false }
