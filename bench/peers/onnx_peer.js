// Times ONNX Runtime on the layers that lithe_bench times.
//
//     echo product_key_memory/forward/tokens:512 | node onnx_peer.js GRAPHS NODE_MODULES [THREADS [SECONDS]]
//
// Speaks the language of torch_peer.py: case names in, lines of JSON out. Calls the package's native binding, not its promise-based
// wrapper, so that a call costs some microseconds and not a turn of the event loop; outputs are allocated once.
'use strict';
const path = require('path');
const readline = require('readline');

const [graphs, modules, threads = '2', seconds = '1'] = process.argv.slice(2);
const { Tensor } = require(path.join(modules, 'onnxruntime-common'));
const { binding, initOrt } = require(path.join(modules, 'onnxruntime-node', 'dist', 'binding.js'));
const version = require(path.join(modules, 'onnxruntime-node', 'package.json')).version;
initOrt();

const FEATURES = 1024, SUB_KEYS = 512, SLOTS = SUB_KEYS * SUB_KEYS, PICKS = 128;

function fill(array, draw) {
  for (let i = 0; i < array.length; ++i) array[i] = draw();
  return array;
}
let state = 12345;  // xorshift32: Math.random takes minutes for a gigabyte
const bits = () => {
  state ^= state << 13; state ^= state >>> 17; state ^= state << 5;
  return state;
};
const symmetric = () => bits() / 2147483648;
const floats = (...dims) => new Tensor('float32', fill(new Float32Array(dims.reduce((a, b) => a * b)), symmetric), dims);

const once = (make) => { let made = null; return () => (made ??= make()); };
const values = once(() => floats(SLOTS, FEATURES)), smallValues = once(() => floats(1352 * 1352 / 4, 256));
const repeat = (n, make) => Array.from({ length: n }, make);
const cold = (tokens) => (tokens > 1 ? 8 : 256);  // sets of tokens, so that what they pick is in no cache
const three = (...dims) => ({ q: floats(...dims), k: floats(...dims), v: floats(...dims) });

// family -> parameters -> [graph, feeds to take in turn, output shape, items]
const families = {
  'product_key_memory/forward': ({ tokens }) => [`product_key_memory_${tokens}`,
    repeat(cold(tokens), () => ({ x: floats(tokens, FEATURES), values: values() })), [tokens, FEATURES], tokens],
  'feed_forward/forward': ({ tokens }) => [`feed_forward_${tokens}`, [{ x: floats(tokens, FEATURES) }], [tokens, FEATURES], tokens],
  'gather_sum': () => ['gather_sum', repeat(8, () => ({
    slots: new Tensor('int64', fill(new BigInt64Array(512 * PICKS), () => BigInt((bits() >>> 0) % SLOTS)), [512, PICKS]),
    weights: floats(512, PICKS), values: values() })), [512, FEATURES], 512],
  'top_k': () => ['top_k', [{ x: floats(4096, SUB_KEYS) }], [4096, 32], 4096],
  'attention/exact_causal': ({ length }) => [`attention_causal_${length}`, [three(1, length, 256)], [1, length, 256], length],
  'attention/exact_bidirectional': ({ length }) => [`attention_bidirectional_${length}`, [three(1, length, 256)], [1, length, 256], length],
  'attention/local': ({ length }) => [`attention_local_${length}`, [three(4, length, 64)], [4, length, 64], length],
  'collaborative/forward': ({ length, shared }) => [`collaborative_${shared}_${length}`, [{ x: floats(length, 768) }], [length, 768], length],
  'mixture_of_experts/forward': ({ tokens }) => [`mixture_of_experts_${tokens}`,
    repeat(cold(tokens), () => ({ x: floats(tokens, 512) })), [tokens, 512], tokens],
  'ultra_mem/forward': ({ tokens }) => [`ultra_mem_${tokens}`,
    repeat(cold(tokens), () => ({ x: floats(tokens, 512), values: smallValues() })), [tokens, 512], tokens],
};

function parse(name) {
  const parts = name.split('/'), parameters = {};
  for (const p of parts.filter((p) => p.includes(':'))) parameters[p.split(':')[0]] = Number(p.split(':')[1]);
  return [parts.filter((p) => !p.includes(':')).join('/'), parameters];
}

function build(name) {
  const [family, parameters] = parse(name);
  if (!(family in families)) throw new Error('no such case');
  const [graph, feeds, shape, items] = families[family](parameters);
  const session = new binding.InferenceSession();
  session.loadModel(path.join(graphs, graph + '.onnx'),
    { intraOpNumThreads: Number(threads), interOpNumThreads: 1, executionMode: 'sequential', graphOptimizationLevel: 'all' });
  const y = new Tensor('float32', new Float32Array(shape.reduce((a, b) => a * b)), shape);
  let turn = 0;
  return { run: () => session.run(feeds[turn++ % feeds.length], { y }, {}), items, close: () => session.dispose() };
}

function measure(run, budget) {
  const times = [], start = process.hrtime.bigint();
  while (times.length < 2 || Number(process.hrtime.bigint() - start) < budget * 1e9) {
    const before = process.hrtime.bigint();
    run();
    times.push(Number(process.hrtime.bigint() - before));
  }
  times.sort((a, b) => a - b);
  return [times[times.length >> 1] / 1000, times.length];
}

console.log(JSON.stringify({ peer: 'onnxruntime', version }));
let current = null;
readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const name = line.trim(), answer = { case: name, peer: 'onnxruntime' };
  try {
    if (current?.name !== name) {
      current?.close();
      current = null;
      current = { name, ...build(name) };
      current.run();  // warm-up
    }
    const [microseconds, runs] = measure(current.run, Number(seconds));
    Object.assign(answer, { runs, us_per_token: microseconds / current.items });
  } catch (error) {
    answer.error = String(error.message ?? error);
  }
  console.log(JSON.stringify(answer));
});
