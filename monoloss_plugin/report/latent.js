// One latent: its numbers, its images, its neighbours.

const BAND_HELP = {
  top: ["Top", "the images that activate it most"],
  middle: ["Middle", "images in the middle of those that activate it"],
  bottom: ["Bottom", "the images that activate it least"],
  "near misses": ["Near misses", "images like those that activate it, which do not"],
};

function numbers(sae, latent) {
  const names = Object.keys(sae.columns).filter((name) => name !== "class");
  const items = names.map((name) => {
    const { label, help } = columnOf(name);
    const more = name === "score" ? `chance ${number(sae.chance)}` : "";
    return el(
      "div",
      {},
      el("dt", {}, label),
      el("dd", {}, cellText(sae, name, latent), more && el("small", {}, more)),
      el("dd", { class: "help" }, help),
    );
  });
  return el("dl", { class: "numbers" }, ...items);
}

/** A band of images, with a bar under each, relative to the latent's largest activation. */
function bandSection(sae, latent, name) {
  const [title, help] = BAND_HELP[name] ?? [name, ""];
  const isCosine = name === "near misses";
  const word = isCosine ? "cosine" : "activation";
  const largest = sae.columns.largest?.[latent] || sae.band("top", latent)[0]?.value || 1;
  const cells = sae.band(name, latent).map((entry) => {
    const { of, value } = entry;
    const text = `${word} ${number(value)}`;
    const shown = bar(isCosine ? value : value / largest, text);
    const link = withMap(thumbnail(of, text), sae, name, latent, entry, text);
    return el("li", {}, link, shown, el("span", { class: "muted" }, number(value)));
  });
  const images = cells.length
    ? el("ol", { class: "band" }, ...cells)
    : el("p", { class: "empty" }, "None.");
  const bars = isCosine ? "; bars: cosine" : "";
  return el(
    "section",
    {},
    el("h3", {}, title, help && el("small", {}, help + bars)),
    images,
  );
}

function breakdown(sae, latent) {
  const parts = sae.breakdown(latent);
  if (!parts.length) return null;
  const support = sae.columns.support?.[latent] || parts.reduce((sum, part) => sum + part.value, 0);
  const rows = parts.map(({ of, value }) => {
    const share = value / support;
    const text = `${percent(share)} (${grouped.format(value)})`;
    return el("li", {}, el("span", {}, className(of)), bar(share, text), el("span", {}, text));
  });
  return el(
    "section",
    {},
    el("h3", {}, "Classes", el("small", {}, "of the images that activate it")),
    el("ul", { class: "bars" }, ...rows),
  );
}

function activationHistogram(sae, latent) {
  const counts = Array.from(sae.histogram(latent));
  const first = counts.findIndex((count) => count > 0);
  if (first < 0) return null;
  const last = counts.findLastIndex((count) => count > 0);
  const edge = (bin) => (sae.firstBin + bin) / 4; // the power of two
  const text = (power) => String(Number((2 ** power).toPrecision(2)));
  const bars = counts.slice(first, last + 1).map((value, i) => {
    const [from, to] = [edge(first + i), edge(first + i + 1)];
    return { from, to, value, text: `${text(from)} to ${text(to)}: ${grouped.format(value)} images` };
  });
  const range = [edge(first), edge(last + 1)];
  const powers = ticks(range, 5).filter(Number.isInteger);
  const drawn = chart({
    title: `How often latent ${latent} has which activation`,
    caption: "",
    x: { label: "activation, in steps of 2^¼", range, text, at: powers.length > 1 ? powers : range },
    y: { range: [0, Math.max(...counts)] },
    bars,
  });
  const explained = el("small", {}, "number of images with each");
  return el("section", {}, el("h3", {}, "Activations", explained), drawn);
}

/** Links to latents, each with its similarity and first images. */
function similar(title, help, word, links) {
  if (!links.length) return null;
  const rows = links.map(({ sae, latent, value, more }) =>
    el(
      "li",
      {},
      el(
        "div",
        {},
        more ? el("p", { class: "muted" }, more) : null,
        el("p", {}, latentLink(sae, latent), ` ${meaning(sae, latent)}`),
        el("p", { class: "muted" }, `${word} ${number(value)}`),
      ),
      strip(sae, latent, 5),
    ),
  );
  return el(
    "section",
    {},
    el("h3", {}, title, el("small", {}, help)),
    el("ul", { class: "similar" }, ...rows),
  );
}

function neighbours(sae, latent) {
  const links = (found) => found.map(({ of, value }) => ({ sae, latent: of, value }));
  const matches = saes.flatMap((other) => {
    const match = sae.match(other.index, latent);
    return match ? [{ sae: other, latent: match.of, value: match.value, more: other.name }] : [];
  });
  const estimated = "; estimated, and unrelated latents reach about 0.2";
  return [
    similar("Active together", `correlation of activations${estimated}`, "correlation", links(sae.together(latent))),
    similar("In the other SAEs", `the latent that is active on the same images${estimated}`, "correlation", matches),
    similar("Nearest decoder directions", "what they add to a reconstruction is alike", "cosine", links(sae.nearest(latent))),
  ];
}

/** Latents before and after this one in the list's order. */
function stepsFrom(sae, latent) {
  const order = sae.index === list.sae ? list.latents : listLatents(sae, list);
  const place = order.indexOf(latent);
  const at = (i) => (i >= 0 && i < order.length ? latentHref(sae, order[i]) : null);
  return { place, previous: at(place - 1), next: at(place + 1), count: order.length };
}

function stepLink(text, href) {
  return href
    ? el("a", { class: "button", href }, text)
    : el("a", { class: "button", role: "link", "aria-disabled": "true" }, text);
}

function renderLatent(section, sae, latent) {
  const { place, previous, next, count } = stepsFrom(sae, latent);
  const of = `${grouped.format(place + 1)} of ${grouped.format(count)} in the list`;
  const label = sae.columns.class ? className(sae.columns.class[latent]) : "";
  const [name, ...others] = sae.namesOf(latent);
  const also = others.length ? `also ${others.join(", ")}` : "";
  const words = [name, label && `class ${classShare(sae, latent)}`].filter(Boolean).join(" · ");
  section.replaceChildren(
    el(
      "nav",
      { class: "steps", "aria-label": "Latents" },
      stepLink("← Previous", previous),
      el("span", { class: "muted" }, place < 0 ? "not in the list now" : of),
      stepLink("Next →", next),
      el("a", { class: "button close", href: "#latents" }, "Close"),
    ),
    el("h2", { tabindex: -1 }, `Latent ${latent}`, saes.length > 1 ? el("small", {}, sae.name) : ""),
    el("p", { class: "words" }, words, also && el("small", { class: "muted" }, ` ${also}`)),
    numbers(sae, latent),
    mapLegend(sae, latent) ?? "",
    el("div", { class: "bands" }, ...sae.bandNames.map((name) => bandSection(sae, latent, name))),
    el(
      "div",
      { class: "columns" },
      ...[breakdown(sae, latent), activationHistogram(sae, latent), ...neighbours(sae, latent)].filter(Boolean),
    ),
  );
}
