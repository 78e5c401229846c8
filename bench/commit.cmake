# Writes HEADER with the commit being built, touching it only when that has changed. Run at every build: the commit of
# the last configuration may be long past.
execute_process(COMMAND git describe --always --dirty --abbrev=12 WORKING_DIRECTORY ${SOURCE_DIR}
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
file(CONFIGURE OUTPUT ${HEADER} CONTENT "#define ADAATTN_BENCH_COMMIT \"${commit}\"\n")
