# Writes OUT: a C file whose vx_cdef() returns HEADER, preprocessed as LuaJIT wants it.
execute_process(COMMAND ${CC} -E -P -DVX_CDEF ${HEADER} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\\" "\\\\" text "${text}")
string(REPLACE "\"" "\\\"" text "${text}")
string(REPLACE "\n" "\\n\"\n\"" text "${text}")
file(WRITE ${OUT} "#include \"vertex.h\"\n\nconst char *vx_cdef(void)\n{\n    return \"${text}\";\n}\n")
