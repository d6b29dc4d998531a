// Heat maps of latents over images whose features are patches. Without patches, nothing of it shows.

const heat = page.maps && {
  ...page.maps,
  grids: unpack(page.maps.grids),
  sizes: unpack(page.maps.sizes),
  parts: unpack(page.maps.parts),
  isOn: true,
};
if (heat) {
  COLUMNS.adjusted.help = "(MonoScore − chance) / (1 − chance): 0 at chance, 1 if all its patches are alike.";
  COLUMNS.score.help =
    "Mean cosine of pairs of patches of different images, weighted by how strongly they activate the latent.";
  COLUMNS.p.help = "Probability that shuffled activations of images score as high.";
  COLUMNS.largest.help = "Its largest activation of a patch.";
}
const UNKNOWN = 255;
const FULL = 254; // the code of a latent's largest activation

function gridOf(image) {
  const [height, width] = heat.grids.row(image);
  return { height, width, places: height * width };
}

/** Where the maps of each SAE start: by band, and of each image's strongest latents. */
const mapsOf = saes.map((sae, index) => {
  const given = page.saes[index];
  if (!heat || !given.maps) return null;
  const bands = new Map(
    Object.entries(given.maps).map(([name, { count, codes }]) => [
      name,
      once(() => {
        const images = unpack(given.bands[name][0]);
        const wide = given.bands[name][0].shape[1];
        const starts = new Uint32Array(sae.size * wide);
        let start = 0;
        images.values.forEach((image, i) => {
          starts[i] = start;
          if (image >= 0 && i % wide < count) start += gridOf(image).places;
        });
        return { count, wide, starts, codes: unpack(codes).values };
      }),
    ]),
  );
  const strongest = once(() => {
    const [latents, codes] = given.strongest.map((of) => unpack(of).values);
    const starts = [0];
    for (let i = 0; i < heat.seen; i++) starts.push(starts[i] + gridOf(i).places * heat.strongest);
    return { latents, codes, starts };
  });
  return { bands, strongest };
});

/** The codes of a latent over an image of a band, by its rank there; null without a map. */
function bandMap(sae, name, latent, { of, rank }) {
  const band = mapsOf[sae.index]?.bands.get(name)?.();
  if (!band || rank >= band.count) return null;
  const start = band.starts[latent * band.wide + rank];
  return band.codes.subarray(start, start + gridOf(of).places);
}

/** The strongest latents at a place of an image, as {of, code}. */
function latentsAt(sae, image, place) {
  if (!mapsOf[sae.index] || image >= heat.seen) return [];
  const { latents, codes, starts } = mapsOf[sae.index].strongest();
  const first = starts[image] + place * heat.strongest;
  const found = Array.from({ length: heat.strongest }, (_, k) => ({
    of: latents[first + k],
    code: codes[first + k],
  }));
  return found.filter(({ of }) => of >= 0);
}

/** Whether the set holds the patch at a place of an image. All SAEs know it; ask the first. */
function holdsPatch(image, place) {
  const { latents, starts } = mapsOf[0].strongest();
  return latents[starts[image] + place * heat.strongest] !== heat.notHeld;
}

/** The codes of a latent over an image: all of them if a band has its map, else where it leads. */
function imageMap(sae, image, latent) {
  for (const name of mapsOf[sae.index]?.bands.keys() ?? []) {
    const entry = sae.band(name, latent).find(({ of }) => of === image);
    const codes = entry && bandMap(sae, name, latent, entry);
    if (codes) return { codes, isWhole: true };
  }
  const { places } = gridOf(image);
  const codes = Uint8Array.from({ length: places }, (_, place) => {
    if (!holdsPatch(image, place)) return UNKNOWN;
    return latentsAt(sae, image, place).find(({ of }) => of === latent)?.code ?? 0;
  });
  return { codes, isWhole: false };
}

function largestOf(sae, latent) {
  return sae.columns.largest?.[latent] || sae.band("top", latent)[0]?.value || 1;
}

/** The colour of a strength in [0, 1]: red, green, blue and opacity, each up to 255. */
function heatColour(strength) {
  const [from, to] = [[...heat.dark, heat.opaque[0] * 255], [...heat.bright, heat.opaque[1] * 255]];
  return from.map((value, i) => Math.round(value + (to[i] - value) * strength));
}

/** The place with the largest code, or -1 if none is active. */
function strongestPlace(codes) {
  let best = -1;
  codes.forEach((code, place) => {
    if (code && code !== UNKNOWN && (best < 0 || code > codes[best])) best = place;
  });
  return best;
}

function placeText(image, place) {
  const { height, width } = gridOf(image);
  return `row ${Math.floor(place / width) + 1}, column ${(place % width) + 1} of ${height} × ${width}`;
}

function mapText(image, codes, value) {
  const best = strongestPlace(codes);
  const at = best < 0 ? "at no place" : `strongest at ${placeText(image, best)}`;
  return `${value}, ${at}`;
}

/** A map with one pixel for each place, as the address of a picture. */
function mapSource(codes, { height, width }) {
  const canvas = el("canvas", { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  codes.forEach((code, place) => {
    if (code !== UNKNOWN) pixels.data.set(heatColour(code / FULL), 4 * place);
  });
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

/** A map to lie over a picture that covers its box ("slice"), or fits in it ("meet"). */
function mapDrawing(image, codes, fit) {
  const grid = gridOf(image);
  const [wide, high] = heat.sizes.row(image);
  const [left, top, width, height] = heat.parts.row(image);
  const place = `translate(${left * wide} ${top * high})`;
  const scale = `scale(${(width * wide) / grid.width} ${(height * high) / grid.height})`;
  const group = svg("g", { transform: `${place} ${scale}` });
  const source = { href: mapSource(codes, grid), width: grid.width, height: grid.height };
  group.append(svg("image", { ...source, preserveAspectRatio: "none" }));
  const unseen = `M-999-999h9999v9999h-9999zM0 0h${grid.width}v${grid.height}h-${grid.width}z`;
  const veil = svg("path", { class: "unseen", d: unseen });
  veil.style.fill = `rgb(${heat.dark.join(" ")} / ${heat.unseen})`;
  group.append(veil);
  const at = (cell) => [cell % grid.width, Math.floor(cell / grid.width)];
  const stripes = Array.from(codes, (code, cell) => {
    const [x, y] = at(cell);
    return code === UNKNOWN ? `M${x} ${y + 1}l1-1` : "";
  }).join("");
  if (stripes) group.append(svg("path", { class: "stripes", d: stripes }));
  const best = strongestPlace(codes);
  if (best >= 0) {
    const d = `M${at(best).join(" ")}h1v1h-1z`;
    group.append(svg("path", { class: "halo", d }), svg("path", { class: "frame", d }));
  }
  const box = { viewBox: `0 0 ${wide} ${high}`, preserveAspectRatio: `xMidYMid ${fit}` };
  return svg("svg", { class: "heat", "aria-hidden": "true", ...box }, group);
}

/** Lay the map of a latent over a thumbnail of one of its bands. */
function withMap(link, sae, name, latent, entry, value) {
  const codes = heat && bandMap(sae, name, latent, entry);
  if (!codes || !lengths[entry.of]) return link;
  const text = mapText(entry.of, codes, value);
  link.dataset.tip = `${imageText(entry.of)}\n${text}`;
  link.querySelector("img").alt += `; ${text}`;
  link.append(mapDrawing(entry.of, codes, "slice"));
  return link;
}

/** The colours of the maps, over a photograph of medium grey. */
function scaleBar() {
  const stops = [0, 0.2, 0.4, 0.6, 0.8, 1].map((strength) => {
    const [r, g, b, a] = heatColour(strength);
    const seen = [r, g, b].map((value) => Math.round(value * (a / 255) + 128 * (1 - a / 255)));
    return `rgb(${seen.join(" ")})`;
  });
  const bar = el("span", { class: "scale", role: "img", "aria-label": "from dark to bright" });
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  return bar;
}

function turnMaps(isOn) {
  heat.isOn = isOn;
  document.body.classList.toggle("no-maps", !isOn);
  for (const box of document.querySelectorAll(".map-switch input")) box.checked = isOn;
}

function mapSwitch() {
  const box = el("input", { type: "checkbox", onchange: () => turnMaps(box.checked) });
  box.checked = heat.isOn;
  return el("label", { class: "map-switch" }, box, "heat maps ", el("kbd", {}, "m"));
}

/** The switch and the scale of a latent's maps; null without maps. */
function mapLegend(sae, latent) {
  if (!mapsOf[sae.index]) return null;
  return el(
    "p",
    { class: "map-legend" },
    mapSwitch(),
    el("span", {}, "activation of a patch: 0 ", scaleBar(), ` ${number(largestOf(sae, latent))}`),
    el("span", { class: "muted" }, "framed: the strongest patch"),
  );
}
