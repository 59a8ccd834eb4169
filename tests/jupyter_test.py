"""Vertex against Jupyter's own test suite, jupyter_kernel_test (Debian: python3-jupyter-kernel-test).

Run by tests/jupyter_spec.lua where the suite is installed; by hand:
JUPYTER_PATH=PREFIX/share/jupyter python3 tests/jupyter_test.py, after
luajit lua/vertex/interactive/jupyter.lua install --prefix PREFIX.
"""

import unittest

import jupyter_kernel_test


class VertexKernelTests(jupyter_kernel_test.KernelTests):
    kernel_name = "vertex"
    language_name = "lua"
    file_extension = ".lua"
    code_hello_world = 'print "hello, world"'
    code_stderr = 'io.stderr:write "oops"'
    code_generate_error = 'error "expected"'
    code_execute_result = [
        {"code": "6 * 7", "result": "42"},
        {"code": "x = {1, 2, k = 'v'}; x", "result": '{ 1, 2, k = "v" }'},
        {"code": "vx.tensor{1, 2}", "mime": "text/plain"},
    ]
    code_display_data = [
        {"code": 'local mime = function() return {["image/png"] = "\\137PNG"} end '
                 'require("vertex.interactive.display").show(setmetatable({}, {__mime = mime}))',
         "mime": "image/png"},
    ]
    completion_samples = [
        {"text": "string.for", "matches": ["format"]},
        {"text": "vx.quantiz", "matches": ["quantizer", "quantizers", "quantize_hard", "quantize_smooth"]},
    ]
    complete_code_samples = ["1 + 1", "print(2)", "for i = 1, 3 do print(i) end"]
    incomplete_code_samples = ["for i = 1, 3 do", "function f(x)", "x = {"]
    invalid_code_samples = ["end", "x = = 3"]
    code_history_pattern = "6 ?*"
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "vx.tensor"
    code_page_something = "?vx.tensor"


if __name__ == "__main__":
    unittest.main()
