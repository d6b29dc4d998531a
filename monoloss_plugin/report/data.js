// The page's numbers, decoded from the JSON that packing.py writes.

const page = JSON.parse(document.getElementById("data").textContent);
document.getElementById("data").remove();

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const HALVES = new Float32Array(65536).map((_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

const DECODERS = {
  uint8: (buffer) => new Uint8Array(buffer),
  uint16: (buffer) => new Uint16Array(buffer),
  uint32: (buffer) => new Uint32Array(buffer),
  float16: (buffer) => Float32Array.from(new Uint16Array(buffer), (bits) => HALVES[bits]),
  float32: (buffer) => new Float32Array(buffer),
};

/** Decode an array of one dimension, or of two as rows one after another. */
function unpack({ dtype, shape, start = 0, data }) {
  const values = DECODERS[dtype](bytesOf(data).buffer);
  const shifted = start ? Int32Array.from(values, (value) => value + start) : values;
  const width = shape[1] ?? 1;
  return { values: shifted, row: (i) => shifted.subarray(i * width, (i + 1) * width) };
}

/** Decode numbers of images or latents, and the value of each. Row i: [{of, value, rank}, ...]. */
function unpackChosen([chosen, values]) {
  const [of, value] = [unpack(chosen), unpack(values)];
  return (i) => {
    const its = value.row(i);
    const pairs = Array.from(of.row(i), (number, k) => ({ of: number, value: its[k], rank: k }));
    return pairs.filter((pair) => pair.of >= 0);
  };
}

/** Call a function when its value is first needed, and keep the value. */
function once(make) {
  let made;
  return () => (made ??= { value: make() }).value;
}

const saes = page.saes.map((given, index) => {
  const entries = Object.entries(given.columns).map(([name, of]) => [name, unpack(of).values]);
  const bands = Object.entries(given.bands);
  const histogram = once(() => unpack(given.histogram));
  const breakdown = once(() => given.breakdown && unpackChosen(given.breakdown));
  const nearest = once(() => unpackChosen(given.nearest));
  const together = once(() => unpackChosen(given.together));
  const ofImages = once(() => unpackChosen(given.ofImages));
  const matches = given.matches.map((match) => once(() => match && unpackChosen(match)));
  const unpackedBands = new Map(bands.map(([name, band]) => [name, once(() => unpackChosen(band))]));
  return {
    index,
    name: given.name,
    chance: given.chance,
    size: entries[0][1].length,
    columns: Object.fromEntries(entries),
    firstBin: given.firstBin,
    bandNames: [...unpackedBands.keys()],
    namesOf: (latent) => (given.names ? given.names[latent] : []),
    band: (name, latent) => unpackedBands.get(name)?.()(latent) ?? [],
    histogram: (latent) => histogram().row(latent),
    breakdown: (latent) => breakdown()?.(latent) ?? [],
    nearest: (latent) => nearest()(latent),
    together: (latent) => together()(latent),
    ofImage: (image) => ofImages()(image),
    /** The latent of another SAE that is active on the same images, as {of, value}, or undefined. */
    match: (other, latent) => matches[other]?.()?.(latent)[0],
    canMatch: (other) => Boolean(given.matches[other]),
  };
});

const imageLabels = unpack(page.imageLabels).values;

/** The name of a class, or "" for none. */
function className(label) {
  return label >= 0 ? (page.classes[label] ?? `class ${label}`) : "";
}
