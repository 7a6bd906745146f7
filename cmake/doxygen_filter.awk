# What Doxygen reads in place of a header. The inline namespace is an answer to linkers, not a name that anybody writes. Members that every layer
# has are explained once, by the concept; here each gets that explanation. A note behind a member (`// [T x D]`) becomes its docstring.
BEGIN {
  said["using scalar"] = "The number type."
  said["using S"] = "The number type, for short."
  said["using base"] = "What self- and cross-attention of this kind share."
  said["using input_type"] = "What forward reads (lithe::input_of)."
  said["using input_gradient_type"] = "What backward writes for its input (lithe::input_gradient_of)."
  said["using memory"] = "What blocks read beside x: a memory_view, or nothing."
  said["using memory_gradient"] = "Where the gradient of the memory is added: a matrix view, or nothing."
  said["struct record"] = "What `backward` needs of a forward (lithe::layer)."
  said["using record"] = said["struct record"]
  said["struct gradient"] = "The gradients of the parameters, by their names (lithe::layer)."
  said["struct cache"] = "What decoding keeps of the rows so far (lithe::cached_layer)."
  said["using cache"] = said["struct cache"]
  said["output_shape("] = "The shape of y; throws shape_error for an input that does not fit (lithe::layer)."
  said["forward("] = "y = f(x); with a record, for a backward behind it (lithe::layer)."
  said["backward("] = "dx from dy; gradients of parameters are added to g (lithe::layer)."
  said["visit("] = "f(name, ...) for each parameter and part of one layer or of several alike (lithe::layer)."
  said["forward_cost("] = "What a token costs in a sequence of this length (lithe::cost)."
  said["make_cache("] = "An empty cache for so many slots and tokens of each (lithe::cached_layer)."
  said["decode("] = "The outputs of new rows behind what their slots hold; they are appended (lithe::cached_layer)."
  said["fill("] = "Appends new rows without their outputs (lithe::cached_layer)."
  said["truncate("] = "Forgets what a slot holds behind so many tokens (lithe::cached_layer)."
  said["least_length("] = "The fewest tokens, beside none, that `truncate` can leave a slot (lithe::least_length)."
  said["permute("] = "Slot i becomes what slot order[i] was (lithe::cached_layer)."
  said["prepack("] = "Makes what inference computes from the parameters alone (lithe::prepack)."
  said["refresh("] = "Makes the copies of `prepack` again, if there are any."
  said["after_step("] = "Takes from the gradient what an optimiser does not (lithe::after_step)."
  said["prepare("] = "Gives a gradient the shape that make_gradient needs."
  said["forward_in_place("] = "xy = [x₁ | x₂] becomes [y₁ | y₂]; without a record nothing is kept (lithe::reversible_block)."
  said["reverse("] = "xy = [y₁ | y₂] becomes [x₁ | x₂] again, dxy turns from dL/dy into dL/dx; g, and dm, are added to (lithe::reversible_block)."
  said["forward_tapped("] = "y and the tap of x, all [T x D], without a record (lithe::tapped_layer)."
  said["tapped("] = "The tap of a recorded forward, [T x D] (lithe::tapped_layer)."
  said["backward_tapped("] = "dx from dy and dtap, which may be empty: zero; gradients of parameters are added to g (lithe::tapped_layer)."
  said["decode_tapped("] = "The outputs and taps of new rows behind what their slots hold; they are appended (lithe::tapped_layer)."
  said["gather_sum("] = "y_t = or += Σ_j w_tj row[slot_tj], y [T x D] (lithe::value_table)."
  said["row_dots("] = "dw_tj = <dy_t, row[slot_tj]>, dy [T x D] (lithe::value_table)."
  said["scatter_add("] = "g[slot_tj] += w_tj dy_t, dy [T x D] (lithe::value_table)."
  said["read_row("] = "out = row i; throws index_error for one that is not there, shape_error unless out has D numbers (lithe::value_table)."
  said["write_row("] = "Row i = in; throws index_error for one that is not there, shape_error unless in has D numbers (lithe::value_table)."
  said["exits("] = "N, the number of exits."
  said["classes("] = "V, the columns of the logits."
  said["looks_across"] = "Whether a row's output depends on other rows."
}
# The name that a line at the depth of members declares, or nothing.
function declared(line) {
  if (match(line, /^  using [A-Za-z_]+ =/)) return substr(line, 3, RLENGTH - 4)
  if (match(line, /^  struct [a-z_]+/)) return substr(line, 3, RLENGTH - 2)
  if (line ~ /^  static constexpr bool looks_across /) return "looks_across"
  if (line ~ /^  [a-z\[][^(=]*[ >&*][a-z_]+\(/ && match(line, /[a-z_]+\(/)) return substr(line, RSTART, RLENGTH)
  return ""
}
FILENAME !~ /\.hpp$/ { print; next }
{
  sub(/namespace lithe::inline LITHE_ABI/, "namespace lithe")
  # Only types have members: functions stand at the same depth with what looks like them.
  if ($0 ~ /^(struct|class) [^;]*$/) type = 1
  if ($0 ~ /^\}/) type = 0
  documented = $0 ~ /\/\/\//
  # Bodies of functions begin at a line of members that is no type and ends in a brace.
  if (body == "" && match($0, /^ */) && $0 ~ /\) (const |noexcept )*\{$|\) *: .*\{$|^ +: .*\{$/) body = substr($0, 1, RLENGTH)
  if (body == "" && $0 ~ /^  +[A-Za-z].*; +\/\/ / && $0 !~ /\/\/\//) sub(/\/\/ /, "///< ")
  if (body != "" && $0 ~ "^" body "\\}") body = ""
  if ($0 ~ /^  template/ && before !~ /^ *\/\/\//) {
    held = $0  # its docstring stands in front of it
    next
  }
  name = declared($0)
  if (type && !documented && name in said && before !~ /^ *(\/\/\/|template)/) print "  /// " said[name]
  if (held != "") print held
  held = ""
  print
  if ($0 !~ /^ *$/) before = $0
}
