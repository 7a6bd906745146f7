#include <lithe/io/safetensors.hpp>

#include <cstdio>

// Somebody else's program that reads checkpoints: a file that is not there is an error in a sentence.
int main() {
  try {
    lithe::safetensors_file file("no such file");
  } catch (const lithe::io_error& e) {
    std::puts(e.what());
    return 0;
  }
  return 1;
}
