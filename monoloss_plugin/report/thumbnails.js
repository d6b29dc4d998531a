// Images of the page. They come last in the file, in packs, so that the rest is there at once.

const lengths = unpack(page.imageLengths).values;
const starts = new Uint32Array(lengths.length);
for (let i = 1; i < lengths.length; i++) {
  starts[i] = i % page.imagesPerPack ? starts[i - 1] + lengths[i - 1] : 0;
}
const packs = new Map();
let waiting = [];

/** The text of a pack; undefined if the parser has not read all of it. */
function packText(number) {
  if (packs.has(number)) return packs.get(number);
  const element = document.getElementById(`pack-${number}`);
  const isWhole = element?.nextElementSibling || document.readyState !== "loading";
  if (!element || !isWhole) return undefined;
  const text = element.textContent;
  packs.set(number, text);
  element.remove(); // its text would be in memory twice
  return text;
}

/** Set the src of an <img>, and return whether its pack is there. */
function fill(img, image) {
  const text = packText(Math.floor(image / page.imagesPerPack));
  if (text === undefined) return false;
  const data = text.slice(starts[image], starts[image] + lengths[image]);
  const kind = data.startsWith("UklGR") ? "webp" : data.startsWith("iVBOR") ? "png" : "jpeg";
  img.src = `data:image/${kind};base64,${data}`;
  return true;
}

function fillWaiting() {
  waiting = waiting.filter(([img, image]) => img.isConnected && !fill(img, image));
}

if (document.readyState === "loading") {
  const timer = setInterval(fillWaiting, 100);
  document.addEventListener("DOMContentLoaded", () => {
    clearInterval(timer);
    fillWaiting();
  });
}

/** What an image shows, in words. */
function imageText(image) {
  return [page.imageIds[image], className(imageLabels[image])].filter(Boolean).join(", ");
}

/** An image that links to its view. */
function thumbnail(image, value) {
  const link = el("a", { class: "thumb", href: `#image-${image}`, draggable: "false" });
  link.dataset.tip = imageText(image) + (value === undefined ? "" : `\n${value}`);
  link.append(picture(image));
  return link;
}

/** An image, or a grey box with its id if there is no picture. */
function picture(image) {
  const text = imageText(image);
  if (!lengths[image]) {
    return el("span", { class: "missing", role: "img", "aria-label": text }, page.imageIds[image]);
  }
  const img = el("img", { alt: text, width: 64, height: 64, decoding: "async" });
  if (!fill(img, image)) waiting.push([img, image]);
  return img;
}

// One tip for all: what is under the pointer or has the focus.
const tip = document.getElementById("tip");

function showTip(event) {
  const target = event.target.closest?.("[data-tip]");
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const box = target.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4))}px`;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
}

document.addEventListener("pointerover", showTip);
document.addEventListener("focusin", showTip);
document.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
