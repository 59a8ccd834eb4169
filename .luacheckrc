std = "luajit"
max_line_length = 160
exclude_files = { "build", "build-*", "out" }
files["tests"] = { std = "+busted" }
files[".busted"] = { std = "+busted" }
