# Writes OUT: a C file whose NAME() returns the declarations of HEADER as text: preprocessed, without the system's
# headers and without comments, as LuaJIT reads them.
execute_process(COMMAND ${CC} -E -P -DVX_CDEF -I core ${HEADER} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\\" "\\\\" text "${text}")
string(REPLACE "\"" "\\\"" text "${text}")
string(REPLACE "\n" "\\n\"\n\"" text "${text}")
file(WRITE ${OUT} "#include \"${HEADER}\"\n\nconst char *${NAME}(void)\n{\n    return \"${text}\";\n}\n")
