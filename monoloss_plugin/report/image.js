// One image, and the latents that it activates.

/** What the latents that are shown are of the whole: a page holds the strongest of each image. */
function inAll(active) {
  const sum = active.reduce((all, { value }) => all + value, 0);
  return Number.isNaN(sum) || !active.length ? "" : `; these ${active.length} together ${percent(sum)}`;
}

/** Rows of latents, such as {of}. `valueOf` gives the bar and the text of each: {share, text}. */
function latentRows(sae, found, valueOf, prepare = () => {}) {
  const rows = found.map((entry) => {
    const { share, text } = valueOf(entry);
    const row = el(
      "li",
      {},
      el("p", {}, latentLink(sae, entry.of), ` ${meaning(sae, entry.of)}`),
      bar(share, text),
      el("span", {}, text),
      strip(sae, entry.of, 5),
    );
    prepare(row, sae, entry.of);
    return row;
  });
  return rows.length ? el("ul", { class: "bars wide" }, ...rows) : el("p", { class: "empty" }, "None.");
}

function imageLatents(sae, image, prepare) {
  const active = sae.ofImage(image);
  const largest = Math.max(...active.map(({ value }) => Math.abs(value)), 1e-12);
  const valueOf = ({ value }) => ({ share: value / largest, text: percent(value) });
  return el(
    "section",
    {},
    el(
      "h3",
      {},
      saes.length > 1 ? sae.name : "Latents",
      el("small", {}, "what it activates, and the share of the reconstruction", inAll(active)),
    ),
    latentRows(sae, active, valueOf, prepare),
  );
}

function renderImage(section, image) {
  const places = heat && lengths[image] ? placesView(image) : null;
  const large = picture(image);
  large.classList.add("large");
  section.replaceChildren(
    el(
      "nav",
      { class: "steps", "aria-label": "Image" },
      el("button", { type: "button", onclick: () => history.back() }, "← Back"),
      el("a", { class: "button close", href: "#latents" }, "Close"),
    ),
    el("h2", { tabindex: -1 }, page.imageIds[image]),
    el("p", { class: "words" }, className(imageLabels[image]) && `class ${className(imageLabels[image])}`),
    el(
      "div",
      { class: "image-view" },
      places?.element ?? large,
      el(
        "div",
        { class: "columns" },
        ...(places ? [places.list] : []),
        ...saes.map((sae) => imageLatents(sae, image, places?.show)),
      ),
    ),
  );
}
