(() => {
  "use strict";

  // What was trained on: a chosen token shows its label. Texts come in as textContent alone.
  const make = (tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const quoted = (text) => make("code", JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replace(/^ /, "\u00a0"));
  const percent = (share) => {
    if (share === null) return "not known";
    const value = 100 * share;
    if (value > 0 && value < 0.01) return "< 0.01 %";
    return (value >= 99.995 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " %";
  };
  const chance = (logprob) => (logprob === null ? null : Math.exp(logprob));

  for (const article of document.querySelectorAll(".trained article")) {
    const tokens = article.querySelector(".tokens");
    const panel = article.querySelector(".label");
    const { kind, how } = article.dataset;
    const all = [...tokens.querySelectorAll("b")];
    let chosen = null;

    const row = (name, teacher, student, missing) => {
      const made = document.createElement("tr");
      made.append(name);
      for (const [share, who] of [[teacher, "teacher"], [student, "student"]]) {
        const cell = make("td", share === null && who === "student" && missing ? missing : percent(share), "number " + who);
        const bar = make("span");
        bar.style.setProperty("--share", 100 * (share || 0) + "%");
        cell.append(bar);
        made.append(cell);
      }
      return made;
    };
    const named = (text, marks) => {
      const name = make("th");
      name.scope = "row";
      name.append(...(typeof text === "string" ? [make("em", text)] : [quoted(text.text)]));
      for (const mark of marks) name.append(make("span", mark, "mark"));
      return name;
    };
    const others = (label) => {
      if (label.kept < 0) return null;
      if (kind === "sampled") return "not drawn (counts as 0)";
      return kind === "token" ? "all other ids" : "all others, one event";
    };
    const table = (label) => {
      const made = make("table");
      const head = make("tr");
      for (const text of ["id", kind === "sampled" ? "share of draws" : "teacher", "student"]) { const cell = make("th", text); cell.scope = "col"; head.append(cell); }
      const top = make("thead");
      top.append(head);
      const body = make("tbody");
      for (const [text, id, teacher, student, control] of label.ids) {
        const marks = [...(text === "" || text.includes("\ufffd") ? ["id " + id] : []), ...(control ? ["control id"] : []), ...(!how && id === label.token ? ["in the text"] : [])];
        const name = named({ text }, marks);
        name.title = "id " + id;
        body.append(row(name, chance(teacher), chance(student), how ? "has no such token" : ""));
      }
      const rest = label.kept > label.ids.length ? label.kept - label.ids.length : 0;
      if (rest) body.append(sumOfOthers(label, rest));
      const tail = others(label);
      if (tail) body.append(row(named(tail, []), label.tail, label.student_tail));
      made.append(top, body);
      return made;
    };
    const sumOfOthers = (label, rest) => {
      const left = (tail, at) => Math.max(0, label.ids.reduce((sum, one) => sum - (chance(one[at]) || 0), 1 - tail));
      const known = kind !== "sampled";
      return row(named(rest + " more kept", []), known ? left(label.tail, 2) : left(0, 2),
        label.student_tail === null ? null : left(label.student_tail, 3));
    };
    const note = (text) => panel.append(make("p", text, "note"));
    const describe = (token) => {
      const label = JSON.parse(token.dataset.label);
      panel.replaceChildren();
      const of = make("p", "prediction of ", "of");
      of.append(quoted(token.textContent));
      panel.append(of);
      if (how) {
        of.append(how === "chunks" ? ", in a stretch that the teacher reads as " : ", beside the teacher's ");
        if (label.beside.length) label.beside.forEach((text) => of.append(quoted(text), " "));
        else of.append("nothing");
      }
      if (label.kept === 0) { note("No label: here the teacher's tokens have no border in common with the student's."); return; }
      if (how === "chunks") {
        note("Probability of the whole stretch: teacher " + percent(chance(label.target)) + ", student " +
          percent(chance(label.student_target)) + ".");
        return;
      }
      panel.append(table(label));
      if (!how && kind !== "token" && !label.ids.some((one) => one[1] === label.token)) {
        note("The token of the text is among the others: teacher " + percent(chance(label.target)) + ", student " +
          percent(chance(label.student_target)) + ".");
      }
      const nats = (value) => (value === null ? "not known" : value.toFixed(3));
      note("Entropy, nats: " + (kind === "sampled" ? "teacher " : "label ") + nats(label.entropy) + ", student " + nats(label.student_entropy) + ". KL " + nats(label.kl) + ".");
    };
    const choose = (token) => {
      if (chosen) chosen.classList.remove("chosen");
      chosen = token;
      chosen.classList.add("chosen");
      describe(token);
    };
    for (const kindOfEvent of ["pointerover", "click"]) {
      tokens.addEventListener(kindOfEvent, (event) => { if (event.target.matches("b")) choose(event.target); });
    }
    tokens.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const next = all[Math.min(all.length - 1, Math.max(0, all.indexOf(chosen) + move))];
      if (!next) return;
      choose(next);
      next.scrollIntoView({ block: "nearest" });
    });
    const heat = (token) => Number(token.style.getPropertyValue("--a"));
    if (all.length) choose(all.reduce((best, token) => (heat(token) > heat(best) ? token : best), all[0]));
  }
})();
