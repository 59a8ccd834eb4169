std = "luajit"
max_line_length = 120
exclude_files = { "build", "build-*", "out" }
files["tests"] = { std = "+busted" }
files[".busted"] = { std = "+busted" }
