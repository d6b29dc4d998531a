// Small parts of every view: elements, numbers as text, links. Data only ever becomes text.

/** Make an element. Strings among the children become text, never markup. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const COLUMNS = {
  latent: { label: "Latent", help: "Number of the latent in its SAE, from 0." },
  adjusted: {
    label: "Above chance",
    help: "(MonoScore − chance) / (1 − chance): 0 at chance, 1 if all its images are alike.",
  },
  score: {
    label: "MonoScore",
    help: "Mean cosine of pairs of images, weighted by how strongly they activate the latent.",
  },
  z: { label: "z", help: "Standard deviations above what shuffled activations score." },
  p: { label: "p", help: "Probability that shuffled activations score as high." },
  significant: {
    label: "Significant",
    help: "Above chance at 0.01, after the correction of Benjamini and Hochberg.",
  },
  support: { label: "Images", help: "Number of images that activate the latent." },
  frequency: { label: "Frequency", help: "Share of images that activate the latent.", share: true },
  largest: { label: "Largest", help: "Its largest activation." },
  purity: { label: "Purity", help: "Share of its most common class among the images that activate it." },
  purity_adjusted: {
    label: "Purity above chance",
    help: "Purity, with 0 for what a latent without meaning would have, and 1 for one class.",
  },
  images_max_adjusted: {
    label: "Images above chance, largest",
    help: "MonoScore above chance of images, whose activation is the largest of their patches.",
  },
  images_mean_adjusted: {
    label: "Images above chance, mean",
    help: "MonoScore above chance of images, whose activation is the mean of their patches.",
  },
  coherence: {
    label: "Coherence",
    help: "Moran’s I of its heat maps: near 1 if active patches lie together, −1/(P − 1) on average for P places if they lie anywhere.",
  },
  extent: { label: "Extent", help: "Share of an image’s patches that are active.", share: true },
  class: { label: "Class", help: "The most common class of its images." },
  names: { label: "Names", help: "The texts that are most similar to what the latent responds to." },
};

function columnOf(name) {
  return COLUMNS[name] ?? { label: name, help: "" };
}

const grouped = new Intl.NumberFormat("en");

/** A number in three digits; "–" where it is undefined. */
function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return grouped.format(Math.round(value));
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  if (size >= 1) return value.toFixed(2);
  if (size >= 0.001) return value.toFixed(3);
  return value.toExponential(1);
}

/** A probability; one that is too small to mean its digits is "< 1e-6". */
function probability(value) {
  return value < 1e-6 ? "< 1e-6" : number(value);
}

function percent(value) {
  if (Number.isNaN(value)) return "–";
  if (value === 0) return "0 %";
  const size = Math.abs(value * 100);
  return `${(value * 100).toFixed(size >= 10 ? 0 : size >= 1 ? 1 : size >= 0.01 ? 2 : 3)} %`;
}

/** A latent's value in a column, as text. */
function cellText(sae, name, latent) {
  if (name === "latent") return String(latent);
  if (name === "names") return sae.namesOf(latent)[0] ?? "";
  const value = sae.columns[name][latent];
  if (name === "class") return className(value);
  if (name === "significant") return value ? "yes" : "no";
  if (name === "p") return probability(value);
  if (columnOf(name).share) return percent(value);
  return sae.columns[name] instanceof Float32Array ? number(value) : grouped.format(value);
}

function latentHref(sae, latent) {
  return sae.index ? `#sae-${sae.index + 1}-latent-${latent}` : `#latent-${latent}`;
}

function latentLink(sae, latent) {
  return el("a", { class: "number", href: latentHref(sae, latent) }, String(latent));
}

/** The most common class of a latent's images, and its share: "cat: 33 %"; "" for none. */
function classShare(sae, latent) {
  const label = sae.columns.class ? className(sae.columns.class[latent]) : "";
  return label && (sae.columns.purity ? `${label}: ${percent(sae.columns.purity[latent])}` : label);
}

/** What a latent seems to show: its first name, or its class. */
function meaning(sae, latent) {
  const label = classShare(sae, latent);
  return sae.namesOf(latent)[0] ?? (label && `class ${label}`);
}

/** A bar of a share in [-1, 1]; negative shares are hatched. Without a text it is decoration. */
function bar(share, text) {
  const fill = el("span", { class: share < 0 ? "fill negative" : "fill" });
  fill.style.width = `${Math.min(1, Math.abs(share) || 0) * 100}%`;
  const spoken = text ? { role: "img", "aria-label": text } : { "aria-hidden": "true" };
  return el("span", { class: "barline", ...spoken }, fill);
}

/** The first images of a latent, side by side. */
function strip(sae, latent, count) {
  const top = sae.band("top", latent).slice(0, count);
  const images = top.map(({ of, value }) => thumbnail(of, `activation ${number(value)}`));
  return el("div", { class: "strip" }, ...images);
}

/** A labelled <select>. Options: [value, text] pairs. */
function choice(label, options, chosen, onchange) {
  const select = el("select", { onchange: () => onchange(select.value) });
  for (const [value, text] of options) select.append(el("option", { value }, text));
  select.value = chosen;
  return el("label", {}, el("span", {}, label), select);
}

function saeChoice(label, chosen, onchange) {
  const options = saes.map((sae) => [sae.index, sae.name]);
  return choice(label, options, chosen, (value) => onchange(Number(value)));
}

/** Buttons for the pages of a list. */
function pager(current, size, onpage) {
  const button = (text, to, enabled) =>
    el("button", { type: "button", disabled: !enabled, onclick: () => onpage(to) }, text);
  return el(
    "nav",
    { class: "pager", "aria-label": "Pages" },
    button("Previous", current - 1, current > 0),
    el("span", {}, `Page ${grouped.format(current + 1)} of ${grouped.format(Math.max(1, size))}`),
    button("Next", current + 1, current + 1 < size),
  );
}
