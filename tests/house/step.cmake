# What the scripts run, they run through these, so that `ctest -V` shows what is going on and how long it took.

# try(WHAT COMMAND ...): says WHAT before and the seconds behind it. `failed` tells whether a command failed, `said` what they all said.
function(try what)
  message(CHECK_START "${what}")
  string(TIMESTAMP begin "%s%f")
  execute_process(${ARGN} RESULTS_VARIABLE status OUTPUT_VARIABLE said ERROR_VARIABLE said)
  string(TIMESTAMP end "%s%f")
  math(EXPR tenths "(${end} - ${begin} + 50000) / 100000")
  math(EXPR seconds "${tenths} / 10")
  math(EXPR tenths "${tenths} % 10")
  if(status MATCHES "^0(;0)*$")
    message(CHECK_PASS "${seconds}.${tenths} s")
    set(failed FALSE PARENT_SCOPE)
  else()
    message(CHECK_FAIL "failed (${status}), ${seconds}.${tenths} s")
    set(failed TRUE PARENT_SCOPE)
  endif()
  set(said "${said}" PARENT_SCOPE)
endfunction()

# step(WHAT COMMAND ...): the same, for commands that must not fail.
function(step what)
  try("${what}" ${ARGN})
  if(failed)
    message(FATAL_ERROR "${said}")
  endif()
  set(said "${said}" PARENT_SCOPE)
endfunction()
