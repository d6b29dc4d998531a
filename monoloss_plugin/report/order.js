// Which latents are listed, and in which order.

function sortableColumns(sae) {
  return ["latent", ...Object.keys(sae.columns), ...(page.saes[sae.index].names ? ["names"] : [])];
}

/** A number for each latent to sort by; NaN where a value is undefined. */
function sortKeys(sae, column) {
  const latents = Array.from({ length: sae.size }, (_, latent) => latent);
  if (column === "latent") return latents;
  if (column !== "class" && column !== "names") return sae.columns[column];
  const texts = latents.map((latent) => cellText(sae, column, latent));
  const sorted = [...new Set(texts)].sort((a, b) => a.localeCompare(b));
  const ranks = new Map(sorted.map((text, rank) => [text, rank]));
  return texts.map((text) => (text ? ranks.get(text) : NaN));
}

/** Sort latents by a column. Undefined values come last, either way; ties go by number. */
function sortLatents(sae, latents, column, descending) {
  const keys = sortKeys(sae, column);
  const sign = descending ? -1 : 1;
  return latents.sort((a, b) => {
    const [x, y] = [keys[a], keys[b]];
    const undefinedLast = Number.isNaN(x) - Number.isNaN(y);
    return undefinedLast || (Number.isNaN(x) ? 0 : sign * (x - y)) || a - b;
  });
}

/** Every latent, sorted by a column. */
function everyLatent(sae, column, descending) {
  const latents = Array.from({ length: sae.size }, (_, latent) => latent);
  return sortLatents(sae, latents, column, descending);
}

function isWithin(value, least, most) {
  return (least === null || value >= least) && (most === null || value <= most);
}

/** Whether a latent's number, class or names match a text. "#302" means the number alone. */
function matchesText(sae, latent, text) {
  if (!text) return true;
  if (text.startsWith("#")) return String(latent) === text.slice(1).trim();
  if (String(latent) === text) return true;
  const labels = sae.columns.class ? [className(sae.columns.class[latent])] : [];
  return [...labels, ...sae.namesOf(latent)].some((name) => name.toLowerCase().includes(text));
}

/** The latents that pass the filters, in order. A latent whose number is the text comes first. */
function listLatents(sae, list) {
  const text = list.text.trim().toLowerCase();
  const { adjusted, significant, frequency, class: classes } = sae.columns;
  const passes = (latent) =>
    (!adjusted || isWithin(adjusted[latent], list.leastScore, list.mostScore)) &&
    (!list.significant || !significant || significant[latent]) &&
    (!frequency || isWithin(frequency[latent], list.leastFrequency, list.mostFrequency)) &&
    (list.class === "" || !classes || classes[latent] === Number(list.class)) &&
    matchesText(sae, latent, text);
  const column = sortableColumns(sae).includes(list.column) ? list.column : "latent";
  const every = Array.from({ length: sae.size }, (_, latent) => latent);
  const found = sortLatents(sae, every.filter(passes), column, list.descending);
  const exact = text ? found.findIndex((latent) => String(latent) === text) : -1;
  if (exact > 0) found.unshift(...found.splice(exact, 1));
  return found;
}
