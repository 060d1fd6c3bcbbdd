(() => {
  "use strict";
  const NS = "http://www.w3.org/2000/svg";
  const node = (tag, attributes, text) => {
    const made = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Charts: a cursor that reads the values of the nearest step.
  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const series = JSON.parse(svg.dataset.hover);
    const cursor = svg.querySelector(".cursor");
    const bottom = Number(svg.dataset.bottom);
    const width = svg.viewBox.baseVal.width;
    const nearest = (xs, x) => xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      cursor.replaceChildren();
      const first = nearest(series[0].x, x);
      const at = series[0].x[first];
      cursor.append(node("line", { x1: at, x2: at, y1: 8, y2: bottom }));
      const lines = ["step " + series[0].step[first]];
      for (const one of series) {
        const i = nearest(one.x, at);
        cursor.append(node("circle", { class: "dot " + one.colour, cx: one.x[i], cy: one.y[i], r: 4 }));
        lines.push(series.length > 1 ? one.name + "  " + one.text[i] : one.text[i]);
      }
      const boxWidth = Math.max(...lines.map((line) => line.length)) * 8 + 18;
      const left = Math.max(0, at + boxWidth + 14 > width ? at - boxWidth - 10 : at + 10);
      cursor.append(node("rect", { x: left, y: 10, width: boxWidth, height: lines.length * 17 + 9, rx: 5 }));
      lines.forEach((line, i) => cursor.append(node("text", { x: left + 9, y: 27 + i * 17 }, line)));
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => cursor.replaceChildren());
  }

  // Token viewer: pointing, tapping or arrow keys choose a token.
  const viewer = document.querySelector(".viewer");
  if (viewer) {
    const inspector = viewer.querySelector(".inspector p");
    let chosen = null;
    const add = (label, value) => {
      const part = document.createElement("span");
      const strong = document.createElement("em");
      strong.textContent = value;
      part.append(label + " ", strong);
      inspector.append(part);
    };
    const chance = (logprob) => {
      if (logprob === "") return "unknown";
      const percent = 100 * Math.exp(Number(logprob));
      const shown = percent >= 10 ? percent.toFixed(0) : percent >= 0.1 ? percent.toFixed(1) : percent.toExponential(0);
      return shown + " % (" + Number(logprob).toFixed(2) + ")";
    };
    const nats = (value) => (value === "" || value === undefined ? "unknown" : Number(value).toFixed(3));
    const describe = () => {
      if (!chosen) return;
      const when = viewer.querySelector("input[name=when]:checked").value;
      const [student, teacher, kl] = (when === "before" ? chosen.dataset.b : chosen.dataset.a).split(",");
      const other = (when === "before" ? chosen.dataset.a : chosen.dataset.b).split(",")[2];
      inspector.replaceChildren();
      const code = document.createElement("code");
      code.textContent = JSON.stringify(chosen.textContent).slice(1, -1);
      inspector.append(code);
      add("token", chosen.dataset.i);
      if (kl === undefined) { add("no numbers", when); return; }
      add("student", chance(student));
      add("teacher", chance(teacher));
      add("KL " + when, nats(kl));
      if (other !== undefined) add(when === "before" ? "KL after" : "KL before", nats(other));
    };
    const choose = (token) => {
      if (chosen) chosen.classList.remove("chosen");
      chosen = token;
      chosen.classList.add("chosen");
      describe();
    };
    viewer.addEventListener("pointerover", (event) => { if (event.target.matches(".tokens b")) choose(event.target); });
    viewer.addEventListener("click", (event) => { if (event.target.matches(".tokens b")) choose(event.target); });
    viewer.addEventListener("change", describe);
    for (const tokens of viewer.querySelectorAll(".tokens")) {
      tokens.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!move) return;
        event.preventDefault();
        const all = [...tokens.querySelectorAll("b")];
        const at = all.indexOf(chosen);
        const next = all[at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + move))];
        if (next) choose(next);
      });
    }
  }

  // On paper everything is open.
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
