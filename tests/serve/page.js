// Runs the page of a server without a browser, fills its form, and prints what it has sent and shown.
// node page.js URL?items=… CANDIDATE STEPS: a step [list, place, label, value] fills a field in a row of a list, or
// clicks a button there; without a place, it clicks the button of that id.
"use strict";
const [url, candidate, steps] = [process.argv[2], process.argv[3], JSON.parse(process.argv[4])];
const found = {};

function element(name = "") {
  const own = {name, children: [], value: "", textContent: "", hidden: false, attributes: {}};
  const known = child => own.children.findIndex(each => String(each.textContent) === String(child));
  Object.defineProperty(own, "selectedIndex", {
    get: () => known(own.value), set: place => { own.value = own.children[place]?.textContent; },
  });
  return Object.assign(own, {
    append: (...children) => own.children.push(...children),
    replaceChildren: (...children) => { own.children = children; },
    setAttribute: (key, value) => { own.attributes[key] = value; },
    focus: () => {},
  });
}

globalThis.document = {getElementById: id => found[id] ??= element(id), createElement: element};
globalThis.location = {search: new URL(url).search, toString: () => url};
let waiting = 0;
const sent = [], plain = globalThis.fetch;
globalThis.fetch = async (path, options) => {
  if (options?.body) sent.push(options.body);
  waiting++;
  const answer = await plain(new URL(path, url), options).finally(() => setTimeout(() => waiting--, 50));
  return answer;
};
const until = async is => { while (!is()) await new Promise(done => setTimeout(done, 20)); };
const text = each => each.textContent + each.children.map(text).join(" ");

(async () => {
  const page = await (await plain(url)).text();
  eval(page.match(/<script>([^]*)<\/script>/)[1].replace('"use strict";', "") + ";globalThis.add = add");
  await until(() => found.history?.children.length === new URL(url).searchParams.get("items").split(",").length);
  if (found["shown-part"]?.hidden === false) globalThis.add("shown", candidate, "");
  const named = each => each.attributes["aria-label"], texts = each => each.children.map(option => option.textContent);
  const fields = ["user", "history", "shown"].flatMap(list => found[list].children.flatMap(row =>
    row.children.filter(named).map(each => [list, each.name, named(each), texts(each)])));
  for (const [list, place, label, value] of steps) {
    await until(() => waiting === 0);
    const field = place === null ? found[list] : found[list].children[place].children.find(each => named(each) === label);
    if (field.onclick) await field.onclick();
    else Object.assign(field, {value}).onchange();
  }
  await until(() => waiting === 0 && (found.answer.children.length || !found.wrong.hidden));
  const wrong = found.wrong.hidden ? "" : found.wrong.textContent;
  const [answer, stored] = ["answer", "stored"].map(id => text(document.getElementById(id)));
  console.log(JSON.stringify({fields, sent: JSON.parse(sent.at(-1)), answer, stored, wrong}));
})();
