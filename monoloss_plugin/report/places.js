// The places of an image whose features are patches: choose one and see its latents.

/** An image with its places, which shows the map of a latent that is pointed at or chosen. */
function placesView(image) {
  const grid = gridOf(image);
  const [wide, high] = heat.sizes.row(image);
  const frame = el("div", { class: "places-frame" }, picture(image));
  frame.style.aspectRatio = `${wide} / ${high}`;
  frame.style.maxWidth = `min(100%, ${Math.round(384 * Math.min(1, wide / high))}px)`;
  const said = el("p", { class: "muted", role: "status" });
  const list = el("div", { class: "place-latents" });
  const board = el("div", { class: "places", role: "grid", "aria-label": "Places of the image" });
  const [left, top, width, height] = Array.from(heat.parts.row(image), (share) => `${100 * share}%`);
  Object.assign(board.style, { left, top, width, height });
  board.style.gridTemplate = `repeat(${grid.height}, 1fr) / repeat(${grid.width}, 1fr)`;
  let pinned = null;
  const hint = "Choose a place of the image to see its latents; point at a latent to see its map.";

  const end = el("span", {}, "the latent’s largest");
  function draw(latent) {
    frame.querySelector(".heat")?.remove();
    said.textContent = hint;
    end.textContent = latent ? number(largestOf(latent.sae, latent.latent)) : "the latent’s largest";
    if (!latent) return;
    const { codes, isWhole } = imageMap(latent.sae, image, latent.latent);
    frame.querySelector("img, .missing").after(mapDrawing(image, codes, "meet"));
    const where = isWhole ? "" : `; bright where it is among the ${heat.strongest} strongest`;
    const best = strongestPlace(codes);
    const nowhere = isWhole ? "active at no place" : "not among the strongest anywhere";
    const at = best < 0 ? nowhere : `strongest at ${placeText(image, best)}`;
    const whose = saes.length > 1 ? ` of ${latent.sae.name}` : "";
    said.textContent = `Latent ${latent.latent}${whose}: ${at}${best < 0 ? "" : where}.`;
  }

  /** Make a row show the map of its latent: while it is pointed at, or for good with its button. */
  function show(row, sae, latent) {
    const isPinned = () => pinned?.sae === sae && pinned?.latent === latent;
    const button = el(
      "button",
      {
        type: "button",
        class: "map-button",
        "aria-pressed": String(isPinned()),
        "aria-label": `Show the map of latent ${latent}`,
        onclick: () => {
          const key = button.dataset.latent;
          pinned = isPinned() ? null : { sae, latent };
          for (const one of document.querySelectorAll(".map-button")) {
            one.setAttribute("aria-pressed", String(pinned !== null && one.dataset.latent === key));
          }
          turnMaps(true);
          draw(pinned);
        },
      },
      "map",
    );
    button.dataset.latent = `${sae.index}-${latent}`;
    row.querySelector("p").append(" ", button);
    for (const event of ["pointerenter", "focusin"]) row.addEventListener(event, () => draw({ sae, latent }));
    for (const event of ["pointerleave", "focusout"]) row.addEventListener(event, () => draw(pinned));
  }

  function choose(place) {
    for (const cell of board.querySelectorAll("[role=gridcell]")) {
      const isIt = Number(cell.dataset.place) === place;
      cell.setAttribute("aria-selected", String(isIt));
      cell.tabIndex = isIt ? 0 : -1;
    }
    const title = el("h3", {}, `Place: ${placeText(image, place)}`);
    if (!holdsPatch(image, place)) {
      list.replaceChildren(title, el("p", { class: "empty" }, "The set does not hold this patch."));
      return;
    }
    list.replaceChildren(
      title,
      ...saes.map((sae) =>
        el(
          "section",
          {},
          saes.length > 1 ? el("h4", {}, sae.name) : null,
          latentRows(
            sae,
            latentsAt(sae, image, place),
            ({ of, code }) => ({
              share: code / FULL,
              text: number((code / FULL) * largestOf(sae, of)),
            }),
            show,
          ),
        ),
      ),
      el(
        "p",
        { class: "muted" },
        `The ${heat.strongest} latents with the largest activations, and these activations; bars: relative to the latent’s largest.`,
      ),
    );
  }

  function move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: grid.width, ArrowUp: -grid.width };
    const from = Number(event.target.dataset.place);
    const to = from + steps[event.key];
    if (!(event.key in steps)) return;
    event.preventDefault();
    event.stopPropagation();
    const wraps = Math.abs(steps[event.key]) === 1 && Math.floor(to / grid.width) !== Math.floor(from / grid.width);
    if (wraps || to < 0 || to >= grid.places) return;
    choose(to);
    board.querySelector(`[data-place="${to}"]`).focus();
  }

  const cell = (place) => {
    const made = el("button", {
      type: "button",
      role: "gridcell",
      "aria-selected": "false",
      "aria-label": placeText(image, place),
      onclick: () => choose(place),
      onkeydown: move,
    });
    made.dataset.place = place;
    made.tabIndex = place ? -1 : 0;
    return made;
  };
  if (image < heat.seen) {
    for (let row = 0; row < grid.height; row++) {
      const cells = Array.from({ length: grid.width }, (_, i) => cell(row * grid.width + i));
      board.append(el("div", { role: "row" }, ...cells));
    }
    frame.append(board);
  }
  draw(null);
  if (image >= heat.seen) said.textContent = "The file has no room for the latents of this image's places.";
  const legend = el("p", { class: "map-legend" }, mapSwitch(), el("span", {}, "0 ", scaleBar(), " ", end));
  return { element: el("div", {}, frame, said, legend), list, show: image < heat.seen ? show : undefined };
}
