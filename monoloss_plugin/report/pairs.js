// Two SAEs side by side, latent by latent.

const PAIRS_PER_PAGE = 20;

const pairing = { left: 0, right: 1, by: "rank", column: "adjusted", page: 0 };

/** Pairs of latents as [left, right, correlation or undefined]; right is undefined without a match. */
function pairLatents() {
  const [left, right] = [saes[pairing.left], saes[pairing.right]];
  const ranked = everyLatent(left, pairing.column, pairing.column !== "latent");
  if (pairing.by === "match") {
    return ranked.map((latent) => {
      const match = left.match(right.index, latent);
      return [latent, match?.of, match?.value];
    });
  }
  const size = Math.min(left.size, right.size);
  if (pairing.by === "number") return Array.from({ length: size }, (_, latent) => [latent, latent]);
  const others = everyLatent(right, pairing.column, pairing.column !== "latent");
  return ranked.slice(0, size).map((latent, rank) => [latent, others[rank]]);
}

function pairCard(sae, latent) {
  if (latent === undefined) return el("div", { class: "card empty" }, "No match.");
  const values = shownColumns(sae).slice(0, 4).map((name) =>
    el("div", {}, el("dt", {}, columnOf(name).label), el("dd", {}, cellText(sae, name, latent))),
  );
  return el(
    "div",
    { class: "card" },
    el("p", { class: "whose" }, sae.name),
    el("p", {}, latentLink(sae, latent), ` ${meaning(sae, latent)}`),
    el("dl", {}, ...values),
    strip(sae, latent, IMAGES_PER_ROW),
  );
}

function changePairing(section, change) {
  Object.assign(pairing, { page: 0 }, change);
  renderPairs(section);
}

function renderPairs(section) {
  const [left, right] = [saes[pairing.left], saes[pairing.right]];
  const change = (parts) => changePairing(section, parts);
  const ways = [["rank", "same rank"], ["number", "same number"]];
  if (left.canMatch(right.index)) ways.push(["match", "best match"]);
  else if (pairing.by === "match") pairing.by = "rank";
  const common = sortableColumns(left).filter((name) => sortableColumns(right).includes(name));
  const columns = common.map((name) => [name, columnOf(name).label]);
  if (!common.includes(pairing.column)) pairing.column = "latent";
  const pairs = pairLatents();
  const pages = Math.ceil(pairs.length / PAIRS_PER_PAGE);
  const shown = pairs.slice(pairing.page * PAIRS_PER_PAGE, (pairing.page + 1) * PAIRS_PER_PAGE);
  const turn = (to) => {
    change({ page: to });
    scrollTo(0, 0);
  };
  const rows = shown.map(([a, b, correlation]) =>
    el(
      "li",
      { class: "pair" },
      pairCard(left, a),
      correlation === undefined ? null : el("p", { class: "muted correlation" }, `correlation ${number(correlation)}`),
      pairCard(right, b),
    ),
  );
  section.replaceChildren(
    el("h2", { tabindex: -1 }, "Side by side"),
    el(
      "form",
      { class: "filters", onsubmit: (event) => event.preventDefault() },
      saeChoice("Left", pairing.left, (value) => change({ left: value })),
      saeChoice("Right", pairing.right, (value) => change({ right: value })),
      choice("Pair by", ways, pairing.by, (value) => change({ by: value })),
      pairing.by === "number"
        ? null
        : choice("Sort by", columns, pairing.column, (value) => change({ column: value })),
    ),
    el(
      "div",
      { class: "count" },
      el("p", { role: "status" }, `${grouped.format(pairs.length)} pairs`),
      pager(pairing.page, pages, turn),
    ),
    el("div", { class: "pair-heads" }, el("h3", {}, left.name), el("h3", {}, right.name)),
    el("ol", { class: "pairs", start: pairing.page * PAIRS_PER_PAGE + 1 }, ...rows),
    pager(pairing.page, pages, turn),
  );
}
