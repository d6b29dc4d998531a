// The list of latents: search, filters, a sortable table, pages.

const ROWS_PER_PAGE = 50;
const IMAGES_PER_ROW = 10;
const ASCENDING_FIRST = new Set(["latent", "p", "class", "names"]);

const list = {
  sae: 0,
  column: saes[0].columns.adjusted ? "adjusted" : "latent",
  descending: true,
  text: "",
  leastScore: null,
  mostScore: null,
  leastFrequency: null,
  mostFrequency: null,
  significant: false,
  class: "",
  page: 0,
  latents: [],
};

function listedSae() {
  return saes[list.sae];
}

/** The columns that the table shows; the others can be sorted by, and are in a latent's view. */
function shownColumns(sae) {
  const wanted = ["adjusted", "score", "support", "frequency", "largest", "purity_adjusted"];
  return wanted.filter((name) => name in sae.columns);
}

/** Show the list again after a change; a change of anything but the page starts at the first. */
function changeList(change) {
  Object.assign(list, { page: 0 }, change);
  if (!("page" in change)) list.latents = listLatents(listedSae(), list);
  renderRows();
}

function chooseSae(index) {
  list.sae = index;
  if (!sortableColumns(listedSae()).includes(list.column)) list.column = "latent";
  list.latents = listLatents(listedSae(), list);
  renderList();
}

function sortBy(column) {
  const again = column === list.column;
  changeList({ column, descending: again ? !list.descending : !ASCENDING_FIRST.has(column) });
}

function numberField(label, key, scale, placeholder) {
  const input = el("input", {
    type: "number",
    step: "any",
    placeholder,
    "aria-label": label,
    oninput: () => changeList({ [key]: input.value === "" ? null : Number(input.value) / scale }),
  });
  if (list[key] !== null) input.value = list[key] * scale;
  return input;
}

/** Open the first latent that was found. */
function openFirst() {
  if (list.latents.length) location.hash = latentHref(listedSae(), list.latents[0]);
}

function filters(sae) {
  const search = el("input", {
    type: "search",
    id: "search",
    placeholder: "Class, name or number",
    autocomplete: "off",
    oninput: () => changeList({ text: search.value }),
    onkeydown: (event) => event.key === "Enter" && openFirst(),
  });
  search.value = list.text;
  const significant = el("input", {
    type: "checkbox",
    onchange: () => changeList({ significant: significant.checked }),
  });
  significant.checked = list.significant;
  const sorts = sortableColumns(sae).map((name) => [name, columnOf(name).label]);
  const classes = page.classes.map((name, label) => [label, name]);
  const range = (label, ...fields) =>
    el("fieldset", {}, el("legend", {}, label), fields[0], el("span", {}, "to"), fields[1]);
  return el(
    "form",
    { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
    saes.length > 1 ? saeChoice("SAE", list.sae, chooseSae) : null,
    el("label", { class: "search" }, el("span", {}, "Search"), search),
    choice("Sort by", sorts, list.column, sortBy),
    el("button", { type: "button", id: "direction", onclick: () => sortBy(list.column) }),
    sae.columns.class
      ? choice("Class", [["", "any"], ...classes], list.class, (value) => changeList({ class: value }))
      : null,
    range(
      "Above chance",
      numberField("Least score above chance", "leastScore", 1, "−1"),
      numberField("Largest score above chance", "mostScore", 1, "1"),
    ),
    range(
      "Frequency, %",
      numberField("Least frequency in percent", "leastFrequency", 100, "0"),
      numberField("Largest frequency in percent", "mostFrequency", 100, "100"),
    ),
    el("label", { class: "check" }, significant, el("span", {}, "significant only")),
  );
}

function headerCell(name) {
  const { label, help } = columnOf(name);
  const sorted = list.column === name;
  const direction = list.descending ? "descending" : "ascending";
  const button = el("button", { type: "button", title: help, onclick: () => sortBy(name) }, label);
  button.dataset.column = name;
  return el(
    "th",
    { scope: "col", class: `col-${name}`, "aria-sort": sorted ? direction : "none" },
    button,
  );
}

function tableRow(sae, latent) {
  const cells = shownColumns(sae).map((name) => {
    const text = cellText(sae, name, latent);
    const cell = el("td", { class: `col-${name} value` }, el("span", {}, text));
    cell.dataset.label = columnOf(name).label;
    if (name !== "adjusted") return cell;
    if (sae.columns.significant?.[latent] === 0) {
      cell.classList.add("doubtful");
      cell.append(el("small", { title: "Not significantly above chance" }, "n.s."));
    }
    cell.append(bar(Math.max(0, sae.columns.adjusted[latent])));
    return cell;
  });
  const names = sae.namesOf(latent);
  const label = classShare(sae, latent);
  const words = el("td", { class: "col-class" });
  if (names.length) words.append(el("span", { class: "names" }, names[0]));
  if (label) words.append(el("span", { class: names.length ? "class muted" : "class" }, label));
  return el(
    "tr",
    {},
    el("th", { scope: "row", class: "col-latent" }, latentLink(sae, latent)),
    ...cells,
    words,
    el("td", { class: "col-images" }, strip(sae, latent, IMAGES_PER_ROW)),
  );
}

/** Build the list's frame; its rows come from renderRows. */
function renderList() {
  const section = document.getElementById("view-latents");
  section.replaceChildren(
    section.querySelector("h2"),
    filters(listedSae()),
    el("div", { id: "rows" }),
  );
  renderRows();
}

function renderRows() {
  const sae = listedSae();
  const pages = Math.ceil(list.latents.length / ROWS_PER_PAGE);
  const shown = list.latents.slice(list.page * ROWS_PER_PAGE, (list.page + 1) * ROWS_PER_PAGE);
  const turn = (to) => {
    changeList({ page: to });
    document.getElementById("view-latents").scrollIntoView();
  };
  const words = page.saes[sae.index].names ? "names" : "class";
  const head = ["latent", ...shownColumns(sae), words].map(headerCell);
  const table = el(
    "table",
    { class: "latents" },
    el("thead", {}, el("tr", {}, ...head, el("th", { scope: "col", class: "col-images" }, "Top images"))),
    el("tbody", {}, ...shown.map((latent) => tableRow(sae, latent))),
  );
  const count = `${grouped.format(list.latents.length)} of ${grouped.format(sae.size)} latents`;
  const focused = document.activeElement?.dataset?.column;
  document.getElementById("rows").replaceChildren(
    el(
      "div",
      { class: "count" },
      el("p", { id: "count", role: "status" }, count),
      pager(list.page, pages, turn),
    ),
    shown.length ? table : el("p", { class: "empty" }, "No latent passes these filters."),
    shown.length > 10 ? pager(list.page, pages, turn) : "",
  );
  const direction = document.getElementById("direction");
  direction.textContent = list.descending ? "↓ descending" : "↑ ascending";
  const sort = document.querySelector(".filters label:has(+ #direction) select");
  if (sort) sort.value = list.column;
  if (focused) document.querySelector(`[data-column="${CSS.escape(focused)}"]`)?.focus();
}
