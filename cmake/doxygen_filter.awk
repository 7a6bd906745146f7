# What Doxygen reads in place of a header. The inline namespace is an answer to linkers, not a name that anybody writes. Members that every layer
# has are explained once, by the concept; here each gets that explanation. A note behind a member (`// [T x D]`) becomes its docstring.
BEGIN {
  said["using scalar"] = "The number type."
  said["struct record"] = "What `backward` needs of a forward (lithe::layer)."
  said["struct gradient"] = "The gradients of the parameters, by their names (lithe::layer)."
  said["struct cache"] = "What decoding keeps of the rows so far (lithe::cached_layer)."
  said["output_shape("] = "The shape of y; throws shape_error for an input that does not fit (lithe::layer)."
  said["forward("] = "y = f(x); with a record, for a backward behind it (lithe::layer)."
  said["backward("] = "dx from dy; gradients of parameters are added to g (lithe::layer)."
  said["visit("] = "f(name, ...) for each parameter and part of one layer or of several alike (lithe::layer)."
  said["forward_cost("] = "What a token costs in a sequence of this length (lithe::cost)."
  said["make_cache("] = "An empty cache for so many slots and tokens of each (lithe::cached_layer)."
  said["decode("] = "The outputs of new rows behind what their slots hold; they are appended (lithe::cached_layer)."
  said["fill("] = "Appends new rows without their outputs (lithe::cached_layer)."
  said["truncate("] = "Forgets what a slot holds behind so many tokens (lithe::cached_layer)."
  said["permute("] = "Slot i becomes what slot order[i] was (lithe::cached_layer)."
  said["prepack("] = "Makes what inference computes from the parameters alone (lithe::prepack)."
  said["refresh("] = "Makes the copies of `prepack` again, if there are any."
  said["after_step("] = "Takes from the gradient what an optimiser does not (lithe::after_step)."
  said["prepare("] = "Gives a gradient the shape that make_gradient needs."
  said["looks_across"] = "Whether a row's output depends on other rows."
}
# The name that a line at the depth of members declares, or nothing.
function declared(line) {
  if (match(line, /^  (using scalar|struct [a-z_]+)/)) return substr(line, 3, RLENGTH - 2)
  if (line ~ /^  static constexpr bool looks_across /) return "looks_across"
  if (line ~ /^  [a-z\[][^(=]*[ >&*][a-z_]+\(/ && match(line, /[a-z_]+\(/)) return substr(line, RSTART, RLENGTH)
  return ""
}
FILENAME !~ /\.hpp$/ { print; next }
{
  sub(/namespace lithe::inline LITHE_ABI/, "namespace lithe")
  # Bodies of functions begin at a line of members that is no type and ends in a brace.
  if (body == "" && match($0, /^ */) && $0 ~ /\) (const |noexcept )*\{$|\) *: .*\{$|^ +: .*\{$/) body = substr($0, 1, RLENGTH)
  if (body == "" && $0 ~ /^  +[A-Za-z].*; +\/\/ / && $0 !~ /\/\/\//) sub(/\/\/ /, "///< ")
  if (body != "" && $0 ~ "^" body "\\}") body = ""
  if ($0 ~ /^  template/ && before !~ /^ *\/\/\//) {
    held = $0  # its docstring stands in front of it
    next
  }
  name = declared($0)
  if (name in said && before !~ /^ *(\/\/\/|template)/) print "  /// " said[name]
  if (held != "") print held
  held = ""
  print
  if ($0 !~ /^ *$/) before = $0
}
