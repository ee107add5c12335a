// The wire format of charts/pack.py: u32 length, JSON header, padding to 8, arrays.
function unpack(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = view.getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const start = Math.ceil((4 + length) / 8) * 8;
  const types = { f8: Float64Array, f4: Float32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array };
  header.array = ([type, offset, count]) => {
    const Type = types[type], from = bytes.byteOffset + start + offset;
    return from % Type.BYTES_PER_ELEMENT === 0
      ? new Type(bytes.buffer, from, count)
      : new Type(bytes.buffer.slice(from, from + count * Type.BYTES_PER_ELEMENT));
  };
  return header;
}

// Sorted union of sorted arrays, without repeats.
function union(arrays) {
  if (arrays.length === 1) return arrays[0];
  const all = new Float64Array(arrays.reduce((n, a) => n + a.length, 0));
  let at = 0;
  for (const a of arrays) { all.set(a, at); at += a.length; }
  all.sort();
  let kept = 0;
  for (let i = 0; i < all.length; i++) if (i === 0 || all[i] !== all[i - 1]) all[kept++] = all[i];
  return all.subarray(0, kept);
}

// Lines of several parts on one x: what uPlot draws. undefined: no point there; null: the line breaks.
function align(parts) {
  const x = union(parts.map((p) => p.x));
  const columns = new Map();
  let points = 0;
  for (const part of parts) {
    const slot = new Uint32Array(part.x.length);
    for (let i = 0, at = 0; i < slot.length; i++) {
      while (x[at] < part.x[i]) at++;
      slot[i] = at;
    }
    for (const line of part.lines) {
      const column = new Array(x.length).fill(undefined), { y, index, first } = line;
      for (let i = 0; i < y.length; i++) column[slot[index ? index[i] : first + i]] = y[i] === y[i] ? y[i] : null;
      points += y.length;
      columns.set(`${line.id}\n${line.role}`, column);
    }
  }
  return { x: Array.from(x), columns, points };
}
