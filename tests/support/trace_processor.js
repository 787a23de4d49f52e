// Runs Perfetto's trace processor, the WebAssembly that its UI runs in a worker of a browser, under Node.
// node trace_processor.js WEB_DIST REQUESTS REPLIES: a file of RPC requests in, a file of replies out.
const fs = require("node:fs");
const path = require("node:path");

const [folder, requests, replies] = process.argv.slice(2);
const read = (name) => fs.readFileSync(path.join(folder, path.basename(name)));
const out = fs.openSync(replies, "w");
const port = { postMessage: (bytes) => fs.writeSync(out, bytes) };
const worker = { location: { href: "file:///worker.js" } };

class Request {
  open(_, name) {
    this.name = name;
  }
  send() {
    this.response = read(this.name);
  }
}

const names = ["self", "WorkerGlobalScope", "XMLHttpRequest", "process"];
new Function(...names, read("engine_bundle.js").toString())(worker, class {}, Request, undefined);
worker.onmessage({ data: port });
// It is ready once the promises that were made on the way are kept.
setTimeout(() => port.onmessage({ data: new Uint8Array(fs.readFileSync(requests)) }));
