"use strict";
// Text and tokens are inserted into the page only as textContent. `place` is the index of a latent in the table's columns.

const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const LONG = 40; // tokens with more characters are cut
const AROUND = 10; // rows drawn above and below the visible ones
let columns = [ // columns without a value in any row are removed
  { key: "latent", title: "latent", up: true },
  { key: "density", title: "density" },
  { key: "mean", title: "mean" },
  { key: "max", title: "max" },
  { key: "tokens", title: "top tokens", up: true, text: true },
  { key: "labels", title: "label", text: true },
];
const box = byId("rows"), search = byId("search"), which = byId("which"), help = byId("help");
const name = document.title, special = new Set(about.special);
const rowHeight = () => parseFloat(getComputedStyle(box).getPropertyValue("--row")); // pixels; larger on touch screens

let table, words, haystack;
let text = null; // unpacked when the first latent is opened
let places = new Map(); // latent -> place
let order = []; // places in the order of the table
let sorted = { key: "density", up: false };
let current = null; // place of the open latent
const unpacked = new Map();

// ---- data

function unpack(part) {
  if (!unpacked.has(part)) unpacked.set(part, inflate(byId(`packed-${part}`).textContent));
  return unpacked.get(part);
}

async function inflate(base64) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

async function loadEntry(place) {
  const [block, contexts] = await Promise.all([unpack(Math.floor(place / about.block)), unpack("text")]);
  text = contexts;
  return block[place % about.block];
}

// ---- elements

function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function svgElement(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const count = (value) => value.toLocaleString("en");
const number = (value) => (value === 0 ? "0" : Math.abs(value) < 999.5 ? value.toPrecision(3) : count(Math.round(value)));
const percent = (share) => (share === 0 ? "0 %" : `${share < 0.0995 ? (100 * share).toPrecision(2) : Math.round(100 * share)} %`);

const shorten = (word, longest, kept) => (word.length > longest ? `${word.slice(0, kept)}…×${word.length}` : word);

// A single token: spaces are shown as dots, and a long token is cut, with the whole text as its tooltip.
function chip(token) {
  const word = words[token].replaceAll(" ", "·");
  return el("span", { className: "token chip", textContent: shorten(word, 24, 20), title: word });
}

function linkTo(latent) {
  const known = places.has(latent);
  return known ? el("a", { href: `#latent-${latent}`, textContent: latent }) : el("span", { textContent: latent });
}

// ---- the table

const CELLS = {
  latent: (place) => [linkTo(table.latent[place])],
  density: (place) => [percent(table.density[place])],
  mean: (place) => [number(table.mean[place])],
  max: (place) => [number(table.max[place])],
  tokens: (place) => table.tokens[place].map(chip),
  labels: (place) => [table.labels[place]],
};

function makeRow(place) {
  const cells = columns.map(({ key, text }) => {
    const cell = el(key === "latent" ? "th" : "td", { className: text ? "text" : "", title: key === "labels" ? table.labels[place] : "" }, ...CELLS[key](place));
    if (key === "latent") cell.scope = "row";
    cell.dataset.key = key;
    return cell;
  });
  const row = el("tr", {}, ...cells);
  row.dataset.place = place;
  if (place === current) row.setAttribute("aria-current", "true");
  if (table.density[place] === 0) row.className = "dead";
  return row;
}

const visibleColumns = () => Math.max(1, [...box.querySelectorAll("thead th")].filter((head) => head.offsetWidth > 0).length);

function spacer(rows) {
  const space = el("tr", { ariaHidden: "true" }, el("td", { colSpan: visibleColumns() }));
  space.firstChild.style.cssText = `height: ${rows * rowHeight()}px; padding: 0; border: 0`;
  return space;
}

function drawRows() {
  const height = rowHeight();
  const first = Math.max(0, Math.floor(box.scrollTop / height) - AROUND);
  const last = Math.min(order.length, first + Math.ceil(box.clientHeight / height) + 2 * AROUND);
  const rows = order.slice(first, last).map(makeRow);
  rows.forEach((row, index) => { row.ariaRowIndex = String(first + index + 2); }); // 1 is the row of headings
  box.querySelector("table").ariaRowCount = String(order.length + 1); // also those that are not drawn
  if (first > 0) rows.unshift(spacer(first));
  if (last < order.length) rows.push(spacer(order.length - last));
  if (!order.length) rows.push(el("tr", {}, el("td", { colSpan: visibleColumns(), className: "dim text", textContent: "No latent matches." })));
  box.querySelector("tbody").replaceChildren(...rows);
}

function drawHeads() {
  const heads = columns.map(({ key, title, text, up = false }) => {
    const button = el("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      sorted = { key, up: sorted.key === key ? !sorted.up : up };
      updateOrder();
    });
    const head = el("th", { scope: "col", className: text ? "text" : "" }, button);
    head.dataset.key = key;
    if (sorted.key === key) head.ariaSort = sorted.up ? "ascending" : "descending";
    return head;
  });
  box.querySelector("thead tr").replaceChildren(...heads);
}

// Filter by the search text and the menu, then sort. If the search text is a whole number, the latent with that number comes first.
function updateOrder() {
  const query = search.value.trim().toLowerCase() || search.value; // a search for spaces finds spaces
  const matches = { all: () => true, alive: (p) => table.density[p] > 0, dead: (p) => table.density[p] === 0, labeled: (p) => table.labels[p] !== "" }[which.value];
  order = table.latent.map((_, place) => place).filter((place) => matches(place) && haystack[place].includes(query));
  const sign = sorted.up ? 1 : -1;
  const column = sorted.key === "tokens" ? table.tokens.map((tokens) => tokens.map((token) => words[token].trim()).join(" ")) : table[sorted.key];
  order.sort((a, b) => (column[a] < column[b] ? -sign : column[a] > column[b] ? sign : a - b));
  const exact = /^\d+$/.test(query) ? places.get(Number(query)) : undefined;
  if (exact !== undefined && order.includes(exact)) order = [exact, ...order.filter((place) => place !== exact)];
  byId("found").textContent = `${count(order.length)} of ${count(table.latent.length)}`;
  const focused = document.activeElement?.closest("th")?.dataset.key;
  drawHeads();
  if (focused) box.querySelector(`th[data-key=${focused}] button`).focus();
  box.scrollTop = 0;
  drawRows();
}

function reveal(place) {
  const at = order.indexOf(place);
  const height = rowHeight(), visible = box.clientHeight - 2 * height; // below the headings
  if (at >= 0 && (at * height < box.scrollTop || at * height > box.scrollTop + visible)) box.scrollTop = Math.max(0, at * height - visible / 2);
  drawRows();
}

// ---- one latent

// A token within text. `level` is its activation; undefined outside the passage, where activations are not on the page.
function makeToken(place, level, peak) {
  const word = words[place];
  const blank = /^ +$/.test(word), begins = word.startsWith(" ") && !blank; // the leading space is drawn without color
  const shown = blank && word.length > 4 ? `·×${word.length} ` : shorten(begins ? word.slice(1) : word, LONG, 16);
  const token = el("span", { textContent: shown });
  if (level) {
    token.className = "fires";
    token.style.setProperty("--share", `${Math.round((100 * level) / about.levels)}%`);
    token.title = `about ${number((peak * level) / about.levels)}`;
  }
  if (blank) token.classList.add("blank");
  if (special.has(place) || level === undefined) token.classList.add("dim");
  return [begins ? " " : "", token];
}

function makePassage([context, start, position, value, levels], peak) {
  const line = el("p", { className: "passage token" }), ids = text[context];
  const end = start + levels.length;
  const draw = (whole) => {
    line.replaceChildren(!whole && start > 0 ? "…" : "");
    for (let at = whole ? 0 : start; at < (whole ? ids.length : end); at++) {
      const [space, token] = makeToken(ids[at], levels[at - start], peak);
      if (at === position) Object.assign(token, { title: number(value) }).classList.add("chosen");
      line.append(space, token, whole && words[ids[at]].endsWith("↵") ? "\n" : "");
    }
    line.append(!whole && end < ids.length ? "…" : "");
  };
  draw(false);
  const head = el("div", { className: "value", title: `context ${context}, position ${position}` }, number(value));
  if (levels.length < ids.length) head.append(" ", wholeContextButton(line, draw, ids.length));
  return el("li", {}, head, line);
}

function wholeContextButton(line, draw, tokens) {
  const button = el("button", { type: "button", className: "more no-print", textContent: "more", title: `Show the whole context of ${count(tokens)} tokens`, ariaExpanded: "false" });
  button.addEventListener("click", () => {
    const whole = button.ariaExpanded === "false", above = line.querySelector(".chosen").getBoundingClientRect().top;
    draw(whole);
    Object.assign(button, { ariaExpanded: String(whole), textContent: whole ? "less" : "more" });
    window.scrollBy(0, line.querySelector(".chosen").getBoundingClientRect().top - above); // keep the token in its place on the screen
  });
  return button;
}

function passages(title, entries, peak) {
  if (!entries.length) return [];
  return [el("h3", { textContent: title }), el("ol", { className: "passages" }, ...entries.map((one) => makePassage(one, peak)))];
}

function makeHistogram({ bins, width }) {
  const used = bins.findLastIndex((n) => n > 0) + 1, most = Math.max(...bins);
  const [w, h, top] = [360, 84, 14], step = w / used;
  const bars = bins.slice(0, used).map((n, i) => {
    const tall = n ? Math.max(1, (n / most) * (h - top)) : 0;
    const title = svgElement("title", {}, `${number(i * width)} to ${number((i + 1) * width)}: ${count(n)} tokens`);
    return svgElement("rect", { x: i * step, y: h - tall, width: Math.max(1, step - 1), height: tall }, title);
  });
  const label = (x, y, anchor, words) => svgElement("text", { x, y, "text-anchor": anchor }, words);
  return svgElement("svg", { class: "histogram", viewBox: `0 0 ${w} ${h + 16}`, role: "img", "aria-label": "Histogram of activations" },
    ...bars, svgElement("path", { d: `M0 ${h}H${w}` }), label(0, h + 13, "start", "0"), label(w / 2, h + 13, "middle", "activation"),
    label(w, h + 13, "end", number(used * width)), label(w, 10, "end", `tallest: ${count(most)} tokens`));
}

function makeList(title, rows) {
  const body = rows.length ? el("table", {}, el("tbody", {}, ...rows)) : el("p", { className: "dim", textContent: "none" });
  return el("section", {}, el("h3", { textContent: title }), body);
}

const effect = (sign) => ([token, value]) => el("tr", {}, el("th", { scope: "row" }, chip(token)), el("td", { className: sign, textContent: number(value) }));

function latentRow([latent, value, jaccard]) {
  const place = places.get(latent);
  const about = place === undefined ? [] : [...table.tokens[place].map(chip), " ", table.labels[place]];
  const shown = number(value) + (jaccard === undefined ? "" : ` (${jaccard.toFixed(2)})`);
  return el("tr", {}, el("th", { scope: "row" }, linkTo(latent)), el("td", { textContent: shown }), el("td", { className: "text" }, ...about));
}

function article(place, entry) {
  const latent = table.latent[place], density = table.density[place], peak = table.max[place];
  const head = [el("div", { className: "title" }, el("h2", { textContent: `Latent ${latent}` }), stepButton("‹", "Previous latent", -1), stepButton("›", "Next latent", 1))];
  if (table.labels[place]) head.push(el("p", { className: "label", textContent: table.labels[place] }));
  if (density === 0) head.push(el("p", { className: "warning", textContent: `This latent does not fire on any of the ${count(about.tokens)} tokens.` }));
  else head.push(el("p", { textContent: `Fires at ${percent(density)} of ${count(about.tokens)} tokens, with mean ${number(table.mean[place])} and maximum ${number(peak)}.` }), makeHistogram(entry));
  const lists = [makeList("Nearest latents", entry.nearest.map(latentRow)), makeList("Fires with", entry.coactive.map(latentRow))];
  if (entry.raised.length) lists.unshift(makeList("Raises the logits of", entry.raised.map(effect("good"))), makeList("Lowers the logits of", entry.lowered.map(effect("bad"))));
  return [...head, ...passages("Largest activations", entry.top, peak), ...passages("Quantiles, 90 to 10 %", entry.quantiles, peak), el("div", { className: "lists" }, ...lists)];
}

function stepButton(sign, label, by) {
  const button = el("button", { type: "button", className: "no-print", textContent: sign, title: label, ariaLabel: label });
  button.addEventListener("click", () => step(by));
  return button;
}

// On a narrow screen the latent is below the table.
function bringIntoView(article) {
  const top = article.getBoundingClientRect().top, isBelow = top >= box.getBoundingClientRect().bottom;
  if (isBelow && (top < 0 || top > innerHeight / 3)) article.scrollIntoView();
}

async function show(place) {
  current = place;
  reveal(place);
  const entry = await loadEntry(place);
  if (current !== place) return; // another latent was opened in the meantime
  byId("latent").replaceChildren(...article(place, entry));
  bringIntoView(byId("latent"));
  document.title = `latent ${table.latent[place]} · ${name}`;
}

// ---- navigation: #run, #latents or #latent-12

function showMessage(sentence) {
  current = null;
  byId("latent").replaceChildren(el("p", { className: "dim", textContent: sentence }));
  drawRows();
}

const latentInUrl = () => /^#latent-(\d{1,9})$/.exec(location.hash)?.[1]; // the URL changes before the page does

async function route() {
  const latent = latentInUrl();
  const inRun = latent === undefined && location.hash !== "#latents";
  byId("view-run").hidden = !inRun;
  byId("view-latents").hidden = inRun;
  for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = (link.hash === "#run") === inRun ? "page" : null;
  document.title = name;
  if (inRun) return;
  if (latent === undefined) showMessage("Choose a latent.");
  else if (places.has(Number(latent))) await show(places.get(Number(latent)));
  else showMessage(Number(latent) < about.d_sae ? `Latent ${latent} is not on this page, which contains ${count(table.latent.length)} of ${count(about.d_sae)} latents.` : `There is no latent ${latent}: this SAE has latents 0 to ${about.d_sae - 1}.`);
}

const go = (place) => { if (place !== undefined) location.hash = `#latent-${table.latent[place]}`; };

function step(by) {
  const at = order.indexOf(places.get(Number(latentInUrl())));
  go(order[at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + by))]);
}

function goBack() {
  if (document.activeElement === search && search.value) {
    search.value = "";
    updateOrder();
  } else if (document.activeElement === search) search.blur();
  else location.hash = latentInUrl() === undefined ? "#run" : "#latents";
}

const KEYS = {
  "/": () => { if (byId("view-latents").hidden) location.hash = "#latents"; setTimeout(() => search.select()); },
  "?": () => help.showModal(),
  j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
  Enter: () => { go(order[0]); search.blur(); },
  Escape: goBack,
};

document.addEventListener("keydown", (event) => {
  const typing = event.target === search, elsewhere = byId("view-latents").hidden;
  if (event.ctrlKey || event.metaKey || event.altKey || help.open || event.target === which || !(event.key in KEYS)) return;
  if (typing && !["Enter", "Escape", "ArrowDown", "ArrowUp"].includes(event.key)) return;
  if (event.key === "Enter" && !typing) return; // Enter on a link or button
  if (elsewhere && !["/", "?"].includes(event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

// ---- start

async function start() {
  [table, words] = await Promise.all([unpack("table"), unpack("words")]);
  places = new Map(table.latent.map((latent, place) => [latent, place]));
  columns = columns.filter(({ key, text }) => !text || table[key].some((value) => value.length > 0));
  if (!columns.some(({ key }) => key === "labels")) {
    which.querySelector("[value=labeled]").remove();
    search.placeholder = "token or number";
  }
  haystack = table.latent.map((latent, place) => `${latent} ${table.tokens[place].map((token) => words[token]).join("\n")}\n${table.labels[place]}`.toLowerCase());
  updateOrder();
  search.addEventListener("input", updateOrder);
  which.addEventListener("change", updateOrder);
  search.form.addEventListener("submit", (event) => event.preventDefault());
  byId("help-button").addEventListener("click", () => help.showModal());
  let waiting = false;
  box.addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(() => { waiting = false; drawRows(); });
    waiting = true;
  });
  box.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-place]");
    if (row && !event.target.closest("a")) go(Number(row.dataset.place));
  });
  new ResizeObserver(drawRows).observe(box); // also when it becomes visible again, for example after printing
  window.addEventListener("hashchange", route);
  await route();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

if (typeof DecompressionStream === "undefined") document.body.prepend(el("p", { className: "warning", textContent: "This browser cannot decompress the latents. Use a browser from 2024 or later." }));
else start();
