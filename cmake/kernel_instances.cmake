# Reads kernels/instances.def and writes one translation unit per row, the dispatch table, and report_rows.txt: what the
# build report (cmake/kernel_report.cmake) says of each row, those that ADAATTN_KERNEL_FILTER leaves out included.
#   adaattn_kernel_instances(<def> <folder> <table variable> <units variable prefix>)
# sets <prefix>_<arch> to the units of each arch and the table variable to the table's source.
function(adaattn_kernel_instances def folder table prefix)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${def})
  file(STRINGS ${def} rows REGEX "^ADAATTN_KERNEL\\(")
  set(type_bf16 __nv_bfloat16)
  set(type_f16 __half)
  set(type_f32 float)
  set(type_e4m3 __nv_fp8_e4m3)
  set(report "")
  set(declarations "")
  set(entries "")
  set(archs "")
  foreach(row IN LISTS rows)
    if(NOT row MATCHES "^ADAATTN_KERNEL\\(([a-z0-9]+), ([a-z0-9]+), ([a-z0-9]+), ([0-9]+), ([0-9]+), ([a-z0-9]+), \"(.+)\"\\)$")
      message(FATAL_ERROR "${def}: cannot read the row ${row}")
    endif()
    set(arch ${CMAKE_MATCH_1})
    set(phase ${CMAKE_MATCH_2})
    set(type ${type_${CMAKE_MATCH_3}})
    set(d_qk ${CMAKE_MATCH_4})
    set(d_v ${CMAKE_MATCH_5})
    set(features ${CMAKE_MATCH_6})
    set(reason ${CMAKE_MATCH_7})
    set(name ${arch}_${phase}_${CMAKE_MATCH_3}_d${d_qk})
    if(NOT d_v EQUAL d_qk AND NOT d_v EQUAL 0)
      string(APPEND name v${d_v})
    endif()
    string(APPEND name _${features})
    string(APPEND report "${name}|${reason}\n")
    if(ADAATTN_KERNEL_FILTER AND NOT name MATCHES "${ADAATTN_KERNEL_FILTER}")
      continue()
    endif()
    string(SUBSTRING ${phase} 0 1 head)
    string(SUBSTRING ${phase} 1 -1 tail)
    string(TOUPPER ${head} head)
    string(SUBSTRING ${features} 0 1 feature_head)
    string(SUBSTRING ${features} 1 -1 feature_tail)
    string(TOUPPER ${feature_head} feature_head)
    file(CONFIGURE OUTPUT ${folder}/${name}.cu @ONLY CONTENT
"#include \"attend/@arch@/@phase@.cuh\"

namespace adaattn::cuda {
extern const AttendKernel @name@;
const AttendKernel @name@ = @arch@::@head@@tail@<@type@, @d_qk@, @d_v@, k@feature_head@@feature_tail@>::row(\"@name@\");
}  // namespace adaattn::cuda
")
    list(APPEND units_${arch} ${folder}/${name}.cu)
    list(APPEND archs ${arch})
    string(APPEND declarations "extern const AttendKernel ${name};\n")
    string(APPEND entries "    &${name},\n")
  endforeach()
  file(CONFIGURE OUTPUT ${folder}/dispatch_table.cpp @ONLY CONTENT
"#include \"attend/kernel.h\"

namespace adaattn::cuda {
@declarations@
namespace {
const AttendKernel* const kTable[] = {
@entries@};
}  // namespace

std::span<const AttendKernel* const> attend_kernels() { return kTable; }
}  // namespace adaattn::cuda
")
  file(CONFIGURE OUTPUT ${folder}/report_rows.txt @ONLY CONTENT "@report@")
  set(${table} ${folder}/dispatch_table.cpp PARENT_SCOPE)
  list(REMOVE_DUPLICATES archs)
  foreach(arch IN LISTS archs)
    set(${prefix}_${arch} ${units_${arch}} PARENT_SCOPE)
  endforeach()
endfunction()
