'use strict';
// Sorts, filters and pages the table; only the rows of one page are in the document.
(() => {
  const PAGE = 50;
  const data = JSON.parse(document.getElementById('data').textContent);
  const { columns, files } = data;
  const count = files[0].names.length;
  const byKey = new Map(columns.map((column) => [column.key, column]));
  const form = document.getElementById('filters');
  const fields = form.elements;
  const head = document.querySelector('#rows thead tr');
  const body = document.querySelector('#rows tbody');
  const bars = [...document.querySelectorAll('.bar')];
  // Buttons that choose a word in a list of the filters, and the columns that have it.
  const choices = ['level', 'fault'].filter((name) => fields[name]).map((name) => ({
    name,
    buttons: [...document.querySelectorAll(`[data-${name}]`)],
    columns: columns.filter((column) => column.key.startsWith(name)),
  }));
  const collator = new Intl.Collator('en', { numeric: true });

  // The name in the last run that has the file.
  byKey.get('name').values = files[0].names.map((name, row) => files.at(-1).names[row] ?? name);
  const searched = ['name', 'faults', 'faults_a', 'faults_b', 'notes', 'error'].flatMap((key) => byKey.get(key)?.values ? [byKey.get(key).values] : []);
  const haystack = Array.from({ length: count }, (_, row) =>
    searched.map((values) => values[row]).join('\n').toLowerCase());
  const isNumber = (column) => ['number', 'change', 'attribute'].includes(column.kind);
  const missing = (value) => value === null || value === '';

  // Which of name, score and so on is sorted, and the order of all rows by it.
  let sorted = { key: null, ascending: true };
  let order = Array.from({ length: count }, (_, row) => row);
  let shown = order;
  let page = 0;

  function sort(key, ascending) {
    const { values, kind } = byKey.get(key);
    const compare = kind === 'file' || kind === 'text' ? collator.compare : (a, b) => a - b;
    const sign = ascending ? 1 : -1;
    const rows = Array.from({ length: count }, (_, row) => row);
    const there = rows.filter((row) => !missing(values[row]));
    there.sort((a, b) => sign * compare(values[a], values[b]) || a - b);
    order = there.concat(rows.filter((row) => missing(values[row])));
    sorted = { key, ascending };
    for (const cell of head.children) {
      const direction = ascending ? 'ascending' : 'descending';
      if (cell.dataset.key === key) cell.setAttribute('aria-sort', direction);
      else cell.removeAttribute('aria-sort');
    }
    filter();
  }

  function filter() {
    const text = fields.text.value.trim().toLowerCase();
    const range = byKey.get(fields.column.value)?.values;
    const from = fields.from.value === '' ? -Infinity : Number(fields.from.value);
    // Nothing is above 5, or 1: there `below` holds its own end, too.
    const top = { change: Infinity, attribute: 1 }[byKey.get(fields.column.value)?.kind] ?? 5;
    const below = fields.below.value === '' || Number(fields.below.value) >= top
      ? Infinity : Number(fields.below.value);
    const ranged = from !== -Infinity || below !== Infinity;
    const chosen = choices.filter(({ name }) => fields[name].value);
    const errors = fields.errors.checked && byKey.get('error')?.values;
    shown = order.filter((row) =>
      (!text || haystack[row].includes(text)) &&
      (!ranged || (range[row] !== null && range[row] >= from && range[row] < below)) &&
      chosen.every(({ name, columns }) =>
        columns.some((column) => column.values[row].split('; ').includes(fields[name].value))) &&
      (!fields.errors.checked || (errors && errors[row])));
    page = 0;
    mark();
    show();
  }

  // Which bar, level and fault stand for the filters as they are.
  function mark() {
    for (const bar of bars) {
      const pressed = isPressed(bar);
      bar.setAttribute('aria-pressed', String(pressed));
    }
    for (const { name, buttons } of choices) {
      for (const button of buttons) {
        button.setAttribute('aria-pressed', String(button.dataset[name] === fields[name].value));
      }
    }
  }

  function isPressed(bar) {
    const { column, from, below } = bar.dataset;
    return (from !== '' || below !== '') && fields.column.value === column &&
      fields.from.value === from && fields.below.value === below;
  }

  function link(run, row, text) {
    const name = files[run].names[row];
    const anchor = document.createElement('a');
    anchor.textContent = text;
    try {
      const steps = name.split('/').map(encodeURIComponent).join('/');
      const root = name.startsWith('/') ? 'file://' : `${files[run].root.replace(/\/$/, '')}/`;
      anchor.href = root + steps;
    } catch { /* half a character in a name that isn't UTF-8: no link */ }
    return anchor;
  }

  function format(column, value) {
    if (missing(value)) return '';
    if (!isNumber(column)) return value;
    const text = value.toFixed(column.digits);
    return column.kind === 'change' && value > 0 ? `+${text}` : text;
  }

  function cell(column, row) {
    const value = column.values[row];
    const element = document.createElement('td');
    element.className = isNumber(column) ? 'number' : column.kind;
    const text = format(column, value);
    if (column.kind === 'change' && value) element.classList.add(value < 0 ? 'fell' : 'rose');
    const last = files.length - 1;
    const run = column.kind === 'file' ? (files[last].names[row] === null ? 0 : last) : column.run;
    if (run !== null && text !== '') element.append(link(run, row, text));
    else element.textContent = text;
    return element;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    const rows = shown.slice(page * PAGE, (page + 1) * PAGE).map((row) => {
      const element = document.createElement('tr');
      element.append(...columns.map((column) => cell(column, row)));
      return element;
    });
    body.replaceChildren(...rows);
    const number = (value) => value.toLocaleString('en');
    const first = page * PAGE;
    document.getElementById('status').textContent = shown.length
      ? `Rows ${number(first + 1)} to ${number(first + rows.length)} of ${number(shown.length)}` +
        (shown.length < count ? `, out of ${number(count)}.` : '.')
      : `No row of ${number(count)} fits these filters.`;
    document.getElementById('page').textContent = `Page ${number(page + 1)} of ${number(pages)}`;
    const turn = { first: 0, previous: page - 1, next: page + 1, last: pages - 1 };
    for (const button of document.querySelectorAll('[data-page]')) {
      const target = turn[button.dataset.page];
      const nowhere = target < 0 || target >= pages || target === page;
      // Not `disabled`, which would take the focus away from the keyboard.
      button.setAttribute('aria-disabled', String(nowhere));
      button.onclick = () => { if (!nowhere) { page = target; show(); } };
    }
  }

  function press(bar) {
    const on = !isPressed(bar);
    fields.column.value = bar.dataset.column;
    fields.from.value = on ? bar.dataset.from : '';
    fields.below.value = on ? bar.dataset.below : '';
    filter();
  }

  for (const column of columns) {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = column.label;
    button.addEventListener('click', () =>
      sort(column.key, sorted.key === column.key ? !sorted.ascending : true));
    const cell = document.createElement('th');
    cell.scope = 'col';
    cell.dataset.key = column.key;
    if (isNumber(column)) cell.className = 'number';
    cell.append(button);
    head.append(cell);
    if (/^(score|score_a|score_b)$/.test(column.key) || ['change', 'attribute'].includes(column.kind)) {
      fields.column.append(new Option(column.label, column.key));
    }
  }
  fields.errors.disabled = !byKey.has('error');
  form.addEventListener('input', filter);
  form.addEventListener('submit', (event) => event.preventDefault());
  form.addEventListener('reset', () => setTimeout(filter));
  for (const bar of bars) {
    bar.addEventListener('click', () => press(bar));
    bar.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' && event.key !== ' ') return;
      event.preventDefault();
      press(bar);
    });
  }
  for (const { name, buttons } of choices) {
    for (const button of buttons) {
      button.addEventListener('click', () => {
        fields[name].value = fields[name].value === button.dataset[name] ? '' : button.dataset[name];
        filter();
      });
    }
  }
  if (byKey.has('change')) sort('change', true);
  else if (byKey.has('score')) sort('score', true);
  else filter();
})();
