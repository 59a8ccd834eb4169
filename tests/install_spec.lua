-- What is installed, by CMake or as a Debian package, runs from anywhere with its own library; a checkout takes no
-- library but its own.

local H = require "tests.helper"

local build = (os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"):match "^(.*)/"
local WHERE = "print(require 'vertex.core.library'.library_path, vx.zeros { 3 }:numel())"

--- Runs the command `vertex` of an installed tree on a line of Lua, from another folder.
local function vertex(prefix)
  return H.shell(("cd / && echo \"%s\" | env -u VERTEX_LIB '%s/bin/vertex'"):format(WHERE, prefix))
end

describe("installed", function()
  it("it runs from where it is, also when it was moved, and a checkout without a build does not take it", function()
    local prefix, moved, checkout = H.scratch "installed", H.scratch "moved", H.scratch "uninstalled"
    local output, status = H.shell(("cmake --install '%s' --prefix '%s'"):format(build, prefix))
    assert.equal(0, status, output)
    assert.equal(prefix .. "/lib/lua/5.1/vertex/libvertex.so\t3\n", (vertex(prefix)))
    H.shell(("mv '%s' '%s'"):format(prefix, moved))
    assert.equal(moved .. "/lib/lua/5.1/vertex/libvertex.so\t3\n", (vertex(moved)))

    H.shell(("mkdir '%s' && cp -r lua CMakeLists.txt '%s'"):format(checkout, checkout))
    local run = ("cd '%s' && env -u VERTEX_LIB LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' "
      .. "LUA_CPATH='%s/lib/lua/5.1/?.so;;' luajit -e 'vx = require \"vertex\" %s'"):format(checkout, moved,
      (WHERE:gsub("'", '"')))
    output, status = H.shell(run)
    assert.equal(1, status, output)
    assert.truthy(output:find("no library found. Build it with ./setup.sh", 1, true), output)
    assert.falsy(output:find(moved, 1, true), output)
    H.shell(("rm '%s/CMakeLists.txt'"):format(checkout)) -- modules somewhere else in LUA_PATH find what LUA_CPATH has
    assert.equal(moved .. "/lib/lua/5.1/vertex/libvertex.so\t3\n", (H.shell(run)))
  end)

  it("as a package for Debian it names what it needs, and runs", function()
    if H.shell "command -v cpack dpkg-deb" == "" then return pending "there is no cpack or no dpkg-deb" end
    local folder = H.scratch "package"
    local output, status = H.shell(("mkdir '%s' && cpack --config '%s/CPackConfig.cmake' -B '%s' && "
      .. "dpkg-deb -x '%s'/lua-vertex_*.deb '%s/root'"):format(folder, build, folder, folder, folder))
    assert.equal(0, status, output)
    local needs = H.shell(("dpkg-deb -f '%s'/lua-vertex_*.deb Depends"):format(folder))
    for _, name in ipairs { "luajit", "lua-filesystem", "libjpeg62-turbo", "libsndfile1" } do
      assert.truthy(needs:find(name, 1, true), needs)
    end
    assert.equal(folder .. "/root/usr/lib/lua/5.1/vertex/libvertex.so\t3\n", (vertex(folder .. "/root/usr")))
  end)
end)
