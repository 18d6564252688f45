// Runs before the page: what the tests watch and how they speak.
const alarms = [];
window.alert = (text) => alarms.push(`alert ${text}`);
addEventListener('error', (event) => alarms.push(`error ${event.message}`));
addEventListener('securitypolicyviolation', (event) => {
  alarms.push(`blocked ${event.violatedDirective}`);
});

const part = (id) => document.getElementById(`explore-${id}`);
const cards = () => [...part('list').children];
const sleep = (ms) => new Promise((done) => { setTimeout(done, ms); });

function search(text) {
  part('search').value = text;
  part('search').dispatchEvent(new Event('input'));
}

function select(name) {
  const labels = [...part('filters').querySelectorAll('label')];
  return labels.find((label) => label.firstChild.data === name).querySelector('select');
}

function choose(name, value) {
  select(name).value = value;
  select(name).dispatchEvent(new Event('change'));
}

// Leaves the result as the document's only text, in ASCII without HTML's signs.
function finish(result) {
  const json = JSON.stringify({ alarms, result }).replace(/[<>&\u007f-\uffff]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);
  const out = document.createElement('pre');
  out.id = 'result';
  out.textContent = json;
  document.body.replaceChildren(out);
}
