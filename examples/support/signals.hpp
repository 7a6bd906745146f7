#pragma once

// Ctrl-C that saves: SIGINT, SIGTERM, and SIGPIPE where nobody reads any more, ask a program to end at its next step.

#include <sys/types.h>

#include <csignal>
#include <ctime>
#include <initializer_list>

namespace support {

namespace detail {
// What a signal handler may touch; there is one of each in a process, as there is one handler.
inline volatile std::sig_atomic_t signal_number = 0;
inline volatile std::time_t signal_second = 0;
inline volatile pid_t told_too = 0;

inline void on_signal(int number) {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  if (told_too != 0 && number != SIGPIPE) ::kill(told_too, number);
  if (signal_number == 0) {
    signal_second = time.tv_sec;
    signal_number = number;
  } else if (number != SIGPIPE &&
             time.tv_sec - signal_second >= 2) {  // not the same one again, which a terminal and a parent may both send
    std::signal(number, SIG_DFL);
    std::raise(number);
  }
}
}  // namespace detail

/// From here on these only ask the program to end; Ctrl-C once more, some seconds later, and it ends at once.
inline void catch_signals() {
  struct sigaction action {};
  action.sa_handler = detail::on_signal;
  action.sa_flags = SA_RESTART;
  ::sigemptyset(&action.sa_mask);
  for (const int number : {SIGINT, SIGTERM, SIGPIPE}) ::sigaction(number, &action, nullptr);
}
/// From here on they end the program at once again: all that it made is saved.
inline void release_signals() {
  for (const int number : {SIGINT, SIGTERM, SIGPIPE}) std::signal(number, SIG_DFL);
}
/// Whether the program was asked to end.
inline bool stop_asked() { return detail::signal_number != 0; }
/// The exit status of a program that was asked to end: 130 for Ctrl-C, as shells have it; 0 if it was not.
inline int stop_status() { return detail::signal_number == 0 ? 0 : 128 + detail::signal_number; }
/// A process that gets the signals too; 0 for none.
inline void pass_signals_on(pid_t child) { detail::told_too = child; }

}  // namespace support
