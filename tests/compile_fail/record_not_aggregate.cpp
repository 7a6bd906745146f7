// expect: lithe: a record is an aggregate of matrices, vectors, numbers and records.
#include "lithe/layers/record.hpp"

class closed {
 public:
  explicit closed(int n) : n_(n) {}

 private:
  int n_;
};
std::size_t refused(const closed& r) { return lithe::bytes(r); }
