// Which view is shown, keys, and the start.

/** The summary and the list: whether they are shown, and where they were left for which address. */
const home = { isShown: false, scroll: null, left: null };
const sections = {
  latent: document.getElementById("view-latent"),
  image: document.getElementById("view-image"),
  pairs: document.getElementById("view-side-by-side"),
};

/** What an address means: {view, ...}; the summary for an address that means nothing. */
function parseAddress(hash) {
  const latent = /^#(?:sae-(\d+)-)?latent-(\d+)$/.exec(hash);
  if (latent) {
    const sae = saes[Number(latent[1] ?? 1) - 1];
    if (sae && Number(latent[2]) < sae.size) return { view: "latent", sae, latent: Number(latent[2]) };
  }
  const image = /^#image-(\d+)$/.exec(hash);
  if (image && Number(image[1]) < page.imageIds.length) {
    return { view: "image", image: Number(image[1]) };
  }
  if (hash === "#side-by-side" && saes.length > 1) return { view: "pairs" };
  return { view: hash === "#latents" ? "latents" : "summary" };
}

const title = document.title;

function showAddress() {
  const address = parseAddress(location.hash);
  const missing = address.view === "summary" && /^#(sae|latent|image)-/.test(location.hash);
  document.getElementById("missing").hidden = !missing;
  const isHome = address.view === "summary" || address.view === "latents";
  if (home.isShown && !isHome) Object.assign(home, { scroll: scrollY, left: location.hash });
  for (const id of ["view-summary", "view-latents"]) document.getElementById(id).hidden = !isHome;
  for (const [view, section] of Object.entries(sections)) section.hidden = view !== address.view;
  tip.hidden = true;
  document.title = title;
  if (isHome) {
    showHome(address.view);
  } else {
    if (address.view === "latent") {
      renderLatent(sections.latent, address.sae, address.latent);
      document.title = `Latent ${address.latent} · ${title}`;
    } else if (address.view === "image") {
      renderImage(sections.image, address.image);
      document.title = `${page.imageIds[address.image]} · ${title}`;
    } else {
      renderPairs(sections.pairs);
    }
    scrollTo(0, 0);
    sections[address.view].querySelector("h2").focus({ preventScroll: true });
  }
  home.isShown = isHome;
  markCurrent(address.view);
}

/** Show the summary and the list; after another view, at the place that they were left. */
function showHome(view) {
  if (!home.isShown && home.scroll !== null) {
    scrollTo(0, home.scroll);
    const left = document.querySelector(`#view-latents .number[href="${home.left}"]`);
    left?.focus({ preventScroll: true });
  } else if (view === "latents") document.getElementById("view-latents").scrollIntoView();
  else if (location.hash === "#summary") scrollTo(0, 0);
}

function markCurrent(view) {
  const current = view === "pairs" ? "#side-by-side" : view === "summary" ? "#summary" : "#latents";
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.getAttribute("href") === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function isTyping(target) {
  return target.matches?.("input, select, textarea");
}

function goHome() {
  if (home.isShown) return;
  history.pushState(null, "", "#latents");
  showAddress();
}

function step(direction) {
  const address = parseAddress(location.hash);
  if (address.view !== "latent") return;
  const steps = stepsFrom(address.sae, address.latent);
  if (!steps[direction]) return;
  history.replaceState(null, "", steps[direction]); // back leads to where the steps began
  showAddress();
}

function pressKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    tip.hidden = true;
    if (isTyping(event.target)) event.target.blur();
    else goHome();
    return;
  }
  if (event.key === "m" && heat && (!isTyping(event.target) || event.target.type === "checkbox")) {
    turnMaps(!heat.isOn);
    return;
  }
  if (isTyping(event.target)) return;
  if (event.key === "/") {
    event.preventDefault();
    goHome();
    document.getElementById("search").focus();
  } else if (event.key === "j" || event.key === "ArrowRight") step("next");
  else if (event.key === "k" || event.key === "ArrowLeft") step("previous");
}

history.scrollRestoration = "manual";
addEventListener("hashchange", showAddress);
addEventListener("keydown", pressKey);
// An address that is clicked again changes nothing, but leads there again.
document.querySelector(".bar").addEventListener("click", (event) => {
  if (event.target.closest("a")?.hash === location.hash) showAddress();
});

renderCharts();
chooseSae(parseAddress(location.hash).sae?.index ?? 0);
showAddress();
