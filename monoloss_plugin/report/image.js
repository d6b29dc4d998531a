// One image, and the latents that it activates.

/** What the latents that are shown are of the whole: a page holds the strongest of each image. */
function inAll(active) {
  const sum = active.reduce((all, { value }) => all + value, 0);
  return Number.isNaN(sum) || !active.length ? "" : `; these ${active.length} together ${percent(sum)}`;
}

function imageLatents(sae, image) {
  const active = sae.ofImage(image);
  const largest = Math.max(...active.map(({ value }) => Math.abs(value)), 1e-12);
  const rows = active.map(({ of, value }) =>
    el(
      "li",
      {},
      el("p", {}, latentLink(sae, of), ` ${meaning(sae, of)}`),
      bar(value / largest, percent(value)),
      el("span", {}, percent(value)),
      strip(sae, of, 5),
    ),
  );
  return el(
    "section",
    {},
    el(
      "h3",
      {},
      saes.length > 1 ? sae.name : "Latents",
      el("small", {}, "what it activates, and the share of the reconstruction", inAll(active)),
    ),
    rows.length ? el("ul", { class: "bars wide" }, ...rows) : el("p", { class: "empty" }, "None."),
  );
}

function renderImage(section, image) {
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
      large,
      el("div", { class: "columns" }, ...saes.map((sae) => imageLatents(sae, image))),
    ),
  );
}
