--- core/sha256.lua: the SHA-256 of files, by OpenSSL's libcrypto, which is opened at first use.

local ffi = require "ffi"
local library = require "vertex.core.library"

local expect_path, fail = library.expect_path, library.fail

ffi.cdef [[
void *EVP_MD_CTX_new(void);
void EVP_MD_CTX_free(void *context);
const void *EVP_sha256(void);
int EVP_DigestInit_ex(void *context, const void *hash, void *engine);
int EVP_DigestUpdate(void *context, const void *bytes, size_t size);
int EVP_DigestFinal_ex(void *context, unsigned char *out, unsigned int *size);
]]

local CHUNK = 2 ^ 20 -- bytes read at a time

--- Computes the SHA-256 of a file, as sha256sum prints it.
-- @param path of the file
-- @return 64 hexadecimal digits
-- @raise where the file cannot be read, or libcrypto.so.3 is not installed
local function file_sha256(path)
  local ok, crypto = pcall(ffi.load, "libcrypto.so.3")
  if not ok then fail("hashes of files need libcrypto.so.3, Debian package libssl3 (%s)", tostring(crypto)) end
  local file, reason = io.open(expect_path(path), "rb")
  if not file then fail("%s", reason) end
  local context = ffi.gc(crypto.EVP_MD_CTX_new(), crypto.EVP_MD_CTX_free)
  crypto.EVP_DigestInit_ex(context, crypto.EVP_sha256(), nil)
  for bytes in function() return file:read(CHUNK) end do crypto.EVP_DigestUpdate(context, bytes, #bytes) end
  file:close()
  local out, hex = ffi.new "unsigned char[32]", {}
  crypto.EVP_DigestFinal_ex(context, out, nil)
  for i = 0, 31 do hex[i + 1] = ("%02x"):format(out[i]) end
  return table.concat(hex)
end

return { file_sha256 = file_sha256 }
