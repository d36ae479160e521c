'use strict';
// Each part is run until it has been compiled by all of node's compilers, and prints what it computed.
const crypto = require('crypto');
const zlib = require('zlib');
const { Worker, isMainThread, parentPort } = require('worker_threads');

let state = 12345;
const random = () => (state = (Math.imul(state, 1103515245) + 12345) >>> 0);
const digest = (text) => crypto.createHash('sha256').update(text).digest('hex').slice(0, 32);

function floats(rounds) {
  const bodies = Array.from({ length: 5 }, (_, i) => ({ x: i * 1.1, y: i * 0.7, v: 0.01 * i, w: 0.02, m: 1 + i }));
  for (let r = 0; r < rounds; r++) {
    for (const a of bodies) {
      for (const b of bodies) {
        if (a === b) continue;
        const dx = a.x - b.x, dy = a.y - b.y, d = dx * dx + dy * dy + 0.01;
        const f = b.m / (d * Math.sqrt(d));
        a.v -= dx * f * 1e-3;
        a.w -= dy * f * 1e-3;
      }
    }
    for (const a of bodies) { a.x += a.v * 1e-3; a.y += a.w * 1e-3; }
  }
  return bodies.map((b) => b.x + ',' + b.y).join(';');
}

function integers(rounds) {
  let a = 1, b = 0n;
  for (let i = 0; i < rounds; i++) {
    a = (Math.imul(a, 48271) ^ (a >>> 7) ^ random()) | 0;
    if (i % 64 === 0) b = (b * 6364136223846793005n + BigInt(a >>> 0)) & ((1n << 256n) - 1n);
  }
  return a + ' ' + b;
}

function objects(rounds) {
  const map = new Map(), list = [];
  for (let i = 0; i < rounds; i++) {
    const key = 'k' + (random() % 5000);
    map.set(key, (map.get(key) || 0) + i);
    if (i % 3 === 0) list.push({ key, i, nested: { half: i / 2, text: key + i } });
  }
  list.sort((x, y) => (x.key < y.key ? -1 : x.key > y.key ? 1 : x.i - y.i));
  return digest(JSON.stringify([...map]) + JSON.stringify(list));
}

function strings(rounds) {
  let text = '';
  for (let i = 0; i < rounds; i++) text += String.fromCharCode(97 + (random() % 26)) + (i % 11 === 0 ? ' ' : '');
  const words = text.split(' ').map((w) => w.replace(/([aeiou])(.)/g, '$2$1').toUpperCase());
  return digest(words.sort().join('\n')) + zlib.gunzipSync(zlib.gzipSync(text)).equals(Buffer.from(text));
}

function generated(rounds) {
  let sum = 0;
  for (let i = 0; i < rounds; i++) {
    const f = new Function('x', `let s = ${i}; for (let j = 0; j < 2000; j++) s = (s * 31 + x + j) % 65521; return s;`);
    for (let j = 0; j < 5; j++) sum = (sum * 7 + f(j)) % 1000003;
  }
  return String(sum);
}

async function wasm() {
  // (func (export "f") (param i32) (result i32) (local i32)
  //   (loop (local.set 1 (i32.add (i32.mul (local.get 1) (i32.const 31)) (local.get 0)))
  //         (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))
  //   (local.get 1))
  const body = [1, 1, 0x7f, 3, 0x40, 0x20, 1, 0x41, 31, 0x6c, 0x20, 0, 0x6a, 0x21, 1, 0x20, 0, 0x41, 1, 0x6b, 0x22, 0, 0x0d, 0, 0x0b,
    0x20, 1, 0x0b];
  const bytes = Uint8Array.from([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 6, 1, 0x60, 1, 0x7f, 1, 0x7f, 3, 2, 1, 0, 7, 5, 1, 1, 0x66, 0, 0,
    10, body.length + 2, 1, body.length, ...body]);
  const { instance } = await WebAssembly.instantiate(bytes);
  return String(instance.exports.f(3000000));
}

function threads() {
  return Promise.all([1, 2, 3].map((n) => new Promise((resolve, reject) => {
    const worker = new Worker(__filename, { argv: [String(n)] });
    worker.on('message', resolve);
    worker.on('error', reject);
  }))).then((answers) => digest(answers.join()));
}

async function main() {
  const scale = Number(process.argv[2] || 1);
  const parts = { floats: () => floats(40000 * scale), integers: () => integers(3000000 * scale),
    objects: () => objects(150000 * scale), strings: () => strings(300000 * scale), generated: () => generated(300 * scale), wasm,
    threads };
  for (const [name, part] of Object.entries(parts)) console.log(name, await part());
}

if (isMainThread) main();
else { state = Number(process.argv[2]); parentPort.postMessage(floats(4000) + integers(400000) + objects(20000)); }
