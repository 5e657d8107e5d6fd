"use strict";
// Text and tokens only ever enter the page as textContent. `place` is the index of a latent in the table's columns.

const byId = (id) => document.getElementById(id);
const about = JSON.parse(byId("about").textContent);
const ROW = 28; // pixels, as in dashboard.css
const AROUND = 10; // rows drawn above and below the visible ones
const COLUMNS = [
  { key: "latent", title: "latent", up: true },
  { key: "density", title: "density" },
  { key: "mean", title: "mean" },
  { key: "max", title: "max" },
  { key: "tokens", title: "top tokens", up: true },
  { key: "labels", title: "label" },
];
const box = byId("rows"), search = byId("search"), which = byId("which"), help = byId("help");
const name = document.title;

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

// A token on its own: spaces are shown as dots, and a long token is cut, with the whole text as tooltip.
function chip(token) {
  const word = words[token].replaceAll(" ", "·");
  const short = word.length > 24 ? `${word.slice(0, 20)}… ×${word.length}` : word;
  return el("span", { className: "token chip", textContent: short, title: word });
}

function linkTo(latent) {
  const known = places.has(latent);
  return known ? el("a", { href: `#latent-${latent}`, textContent: latent }) : el("span", { textContent: latent });
}

// ---- the table

function makeRow(place) {
  const row = el("tr", {},
    el("td", {}, linkTo(table.latent[place])),
    el("td", { textContent: percent(table.density[place]) }),
    el("td", { textContent: number(table.mean[place]) }),
    el("td", { textContent: number(table.max[place]) }),
    el("td", { className: "text" }, ...table.tokens[place].map(chip)),
    el("td", { className: "text", textContent: table.labels[place], title: table.labels[place] }),
  );
  row.dataset.place = place;
  if (place === current) row.setAttribute("aria-current", "true");
  if (table.density[place] === 0) row.className = "dead";
  return row;
}

function spacer(rows) {
  const space = el("tr", { ariaHidden: "true" }, el("td", { colSpan: COLUMNS.length }));
  space.firstChild.style.cssText = `height: ${rows * ROW}px; padding: 0; border: 0`;
  return space;
}

function drawRows() {
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - AROUND);
  const last = Math.min(order.length, first + Math.ceil(box.clientHeight / ROW) + 2 * AROUND);
  const rows = order.slice(first, last).map(makeRow);
  if (first > 0) rows.unshift(spacer(first));
  if (last < order.length) rows.push(spacer(order.length - last));
  if (!order.length) rows.push(el("tr", {}, el("td", { colSpan: COLUMNS.length, className: "dim text", textContent: "No latent matches." })));
  box.querySelector("tbody").replaceChildren(...rows);
}

function drawHeads() {
  const heads = COLUMNS.map(({ key, title, up = false }) => {
    const button = el("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      sorted = { key, up: sorted.key === key ? !sorted.up : up };
      updateOrder();
    });
    const head = el("th", { scope: "col", className: ["tokens", "labels"].includes(key) ? "text" : "" }, button);
    head.dataset.key = key;
    if (sorted.key === key) head.ariaSort = sorted.up ? "ascending" : "descending";
    return head;
  });
  box.querySelector("thead tr").replaceChildren(...heads);
}

// Filter by the search and the menu, then sort. A whole number puts the latent with that number first.
function updateOrder() {
  const query = search.value.trim().toLowerCase();
  const matches = { all: () => true, alive: (p) => table.density[p] > 0, dead: (p) => table.density[p] === 0, labeled: (p) => table.labels[p] !== "" }[which.value];
  order = table.latent.map((_, place) => place).filter((place) => matches(place) && haystack[place].includes(query));
  const sign = sorted.up ? 1 : -1;
  const column = sorted.key === "tokens" ? table.tokens.map((tokens) => tokens.map((token) => words[token].trim()).join(" ")) : table[sorted.key];
  order.sort((a, b) => (column[a] < column[b] ? -sign : column[a] > column[b] ? sign : a - b));
  const exact = /^\d+$/.test(query) ? places.get(Number(query)) : undefined;
  if (order.includes(exact)) order = [exact, ...order.filter((place) => place !== exact)];
  byId("found").textContent = `${count(order.length)} of ${count(table.latent.length)}`;
  const focused = document.activeElement?.closest("th")?.dataset.key;
  drawHeads();
  if (focused) box.querySelector(`th[data-key=${focused}] button`).focus();
  box.scrollTop = 0;
  drawRows();
}

function reveal(place) {
  const at = order.indexOf(place);
  const visible = box.clientHeight - 2 * ROW; // below the headings
  if (at >= 0 && (at * ROW < box.scrollTop || at * ROW > box.scrollTop + visible)) box.scrollTop = Math.max(0, at * ROW - visible / 2);
  drawRows();
}

// ---- one latent

function makePassage([context, position, value, levels], peak) {
  const line = el("p", { className: "passage token" });
  levels.forEach((level, i) => {
    const at = position - about.before + i;
    if (at < 0 || at >= text[context].length) return;
    const word = words[text[context][at]];
    const blank = /^ +$/.test(word), begins = word.startsWith(" ") && !blank; // that space is drawn before the color
    const token = el("span", { textContent: blank && word.length > 4 ? `·×${word.length} ` : begins ? word.slice(1) : word });
    if (level) {
      token.className = "fires";
      token.style.setProperty("--share", `${Math.round((100 * level) / about.levels)}%`);
      token.title = i === about.before ? number(value) : `about ${number((peak * level) / about.levels)}`;
    }
    if (i === about.before) token.classList.add("chosen");
    if (blank) token.classList.add("blank");
    line.append(begins ? " " : "", token);
  });
  const where = `context ${context}, position ${position}`;
  return el("li", {}, el("span", { className: "value", textContent: number(value), title: where }), line);
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

const effect = (sign) => ([token, value]) => el("tr", {}, el("td", {}, chip(token)), el("td", { className: sign, textContent: number(value) }));

function latentRow([latent, value, jaccard]) {
  const place = places.get(latent);
  const about = place === undefined ? [] : [...table.tokens[place].map(chip), " ", table.labels[place]];
  const shown = number(value) + (jaccard === undefined ? "" : ` (${jaccard.toFixed(2)})`);
  return el("tr", {}, el("td", {}, linkTo(latent)), el("td", { textContent: shown }), el("td", { className: "text" }, ...about));
}

function article(place, entry) {
  const latent = table.latent[place], density = table.density[place], peak = table.max[place];
  const head = [el("h2", { textContent: `Latent ${latent}` })];
  if (table.labels[place]) head.push(el("p", { className: "label", textContent: table.labels[place] }));
  if (density === 0) head.push(el("p", { className: "warning", textContent: `This latent does not fire on any of the ${count(about.tokens)} tokens.` }));
  else head.push(el("p", { textContent: `Fires at ${percent(density)} of ${count(about.tokens)} tokens, with mean ${number(table.mean[place])} and maximum ${number(peak)}.` }), makeHistogram(entry));
  const lists = [makeList("Nearest latents", entry.nearest.map(latentRow)), makeList("Fires with", entry.coactive.map(latentRow))];
  if (entry.raised.length) lists.unshift(makeList("Raises the logits of", entry.raised.map(effect("good"))), makeList("Lowers the logits of", entry.lowered.map(effect("bad"))));
  return [...head, ...passages("Largest activations", entry.top, peak), ...passages("Quantiles, 90 to 10 %", entry.quantiles, peak), el("div", { className: "lists" }, ...lists)];
}

async function show(place) {
  current = place;
  reveal(place);
  const entry = await loadEntry(place);
  if (current !== place) return; // another latent was opened in the meantime
  byId("latent").replaceChildren(...article(place, entry));
  byId("latent").scrollTop = 0;
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
  else showMessage(Number(latent) < about.d_sae ? `Latent ${latent} is not on this page, which holds ${count(table.latent.length)} of ${count(about.d_sae)}.` : `There is no latent ${latent}: this SAE has latents 0 to ${about.d_sae - 1}.`);
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

if (typeof DecompressionStream === "undefined") document.body.prepend(el("p", { className: "warning", textContent: "This browser cannot unpack the latents. Use a browser from 2024 or later." }));
else start();
