/* Matrix products of int8 weights with fp32 activations, the place where all the time goes.

   `Products.matmul` has two ways: a plain loop, which says what is computed, and the same loop four
   numbers at a time (SIMD) in WebAssembly, written below instruction by instruction. A browser
   without SIMD takes the plain loop. The weights lie in the memory that WebAssembly sees. */

const PAGE = 65536; // bytes of a page of WebAssembly's memory
const ROOM = 4 * (4 * 8192 + 8192); // bytes for one x and one y: up to 4 * 8192 and 8192 numbers

/* An unsigned number in 7-bit groups, as WebAssembly writes it (LEB128). */
const leb = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...leb(n >>> 7)]);
const sized = (bytes) => [...leb(bytes.length), ...bytes];
const section = (id, bytes) => [id, ...sized(bytes)];
const text = (word) => sized([...new TextEncoder().encode(word)]);

/* The instructions used, as bytes. */
const get = (local) => [0x20, local], set = (local) => [0x21, local];
const tee = (local) => [0x22, local]; // sets and gets
const number = (n) => [0x41, n]; // below 64
const add = [0x6a], less = [0x49], loop = [0x03, 0x40], again = [0x0d, 0], end = [0x0b];
const simd = (code, ...rest) => [0xfd, ...leb(code), ...rest];
const zeros = [...number(0), ...simd(0x11)]; // i32x4.splat
const load8 = simd(0x01, 0, 0); // 8 int8 become 8 int16
const low = simd(0xa7), high = simd(0xa8); // 4 of those become int32
const toFloat = simd(0xfa); // int32 become fp32
const load = (offset) => simd(0x00, 2, offset), times = simd(0xe6), plus = simd(0xe4);
const lane = (i) => simd(0x1f, i), addFloat = [0x92], storeFloat = [0x38, 2, 0];

/* dots(w, x, xEnd, y, yEnd): y[o] = sum_i w[o, i] x[i]. Arguments are addresses in bytes. */
function moduleBytes() {
  const [w, x, xEnd, y, yEnd, xi, eight, sum0, sum1] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const addFour = (half, offset, sum) => [ // sum += half of the eight weights * four of x
    ...get(eight), ...half, ...toFloat, ...get(xi), ...load(offset), ...times,
    ...get(sum), ...plus, ...set(sum),
  ];
  const body = [
    ...loop, // for each output
    ...zeros, ...set(sum0), ...zeros, ...set(sum1), ...get(x), ...set(xi),
    ...loop, // for each 8 inputs
    ...get(w), ...load8, ...set(eight),
    ...addFour(low, 0, sum0), ...addFour(high, 16, sum1),
    ...get(w), ...number(8), ...add, ...set(w),
    ...get(xi), ...number(32), ...add, ...tee(xi), ...get(xEnd), ...less, ...again,
    ...end,
    ...get(y), // where the sum of the 4 lanes goes
    ...get(sum0), ...get(sum1), ...plus, ...set(sum0),
    ...[0, 1, 2, 3].flatMap((i) => [...get(sum0), ...lane(i), ...(i ? addFloat : [])]),
    ...storeFloat,
    ...get(y), ...number(4), ...add, ...tee(y), ...get(yEnd), ...less, ...again,
    ...end, ...end,
  ];
  const i32 = 0x7f, v128 = 0x7b;
  const locals = [2, 1, i32, 3, v128]; // xi; eight, sum0, sum1
  return new Uint8Array([
    0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0, // "\0asm", version 1
    ...section(1, [1, 0x60, 5, i32, i32, i32, i32, i32, 0]), // one type: five i32, no result
    ...section(2, [1, ...text("js"), ...text("memory"), 2, 0, 1]), // a memory is imported
    ...section(3, [1, 0]), // one function of type 0
    ...section(7, [1, ...text("dots"), 0, 0]), // it is exported
    ...section(10, [1, ...sized([...locals, ...body])]), // its code
  ]);
}

export class Products {
  constructor(tensors, simd) {
    const placed = [...tensors.values()].filter(({ data }) => data instanceof Int8Array);
    const bytes = placed.reduce((sum, { data }) => sum + data.length, ROOM);
    this.memory = new WebAssembly.Memory({ initial: Math.ceil(bytes / PAGE) });
    this.used = ROOM;
    this.simd = simd && WebAssembly.validate(moduleBytes());
    if (this.simd) {
      const module = new WebAssembly.Module(moduleBytes());
      this.dots = new WebAssembly.Instance(module, { js: { memory: this.memory } }).exports.dots;
    }
  }

  place(weight) { // a copy in our memory
    const copy = new Int8Array(this.memory.buffer, this.used, weight.length);
    copy.set(weight);
    this.used += weight.length;
    return copy;
  }

  /* y[t, o] = sum_i w[o, i] x[t, i]: (n_out, n_in) and (T, n_in) -> (T, n_out). */
  matmul(w, x, T, n_out, n_in) {
    const y = new Float32Array(T * n_out);
    if (this.simd) {
      const xs = new Float32Array(this.memory.buffer, 0, n_in);
      const ys = new Float32Array(this.memory.buffer, 4 * n_in, n_out);
      for (let t = 0; t < T; t++) {
        xs.set(x.subarray(t * n_in, (t + 1) * n_in));
        this.dots(w.byteOffset, 0, 4 * n_in, 4 * n_in, 4 * (n_in + n_out));
        y.set(ys, t * n_out);
      }
      return y;
    }
    for (let t = 0; t < T; t++) {
      for (let o = 0; o < n_out; o++) {
        let sum = 0;
        for (let i = 0, at = o * n_in; i < n_in; i++) sum += w[at + i] * x[t * n_in + i];
        y[t * n_out + o] = sum;
      }
    }
    return y;
  }
}
