// A reverse proxy: node front.mjs PORT ENDPOINT SERVER.pem SERVER.key CLIENT-CA.pem; SIGHUP replaces its server.
import { readFileSync } from "node:fs";
import { request as forward } from "node:http";
import { createSecureServer } from "node:http2";

const [port, endpoint, cert, key, ca] = process.argv.slice(2);
const OF_ONE_CONNECTION = ["connection", "keep-alive", "transfer-encoding", "host"];

function forwardable(headers) {
  const names = Object.keys(headers).filter((name) => !name.startsWith(":") && !OF_ONE_CONNECTION.includes(name));
  return Object.fromEntries(names.map((name) => [name, headers[name]]));
}

function passOn(request, response) {
  const options = { port: endpoint, method: request.method, path: request.url, headers: forwardable(request.headers) };
  const onward = forward({ host: "127.0.0.1", agent: false, ...options }, (answer) => {
    response.writeHead(answer.statusCode, forwardable(answer.headers));
    answer.pipe(response);
  });
  onward.on("error", () => response.headersSent || response.writeHead(502).end());
  request.pipe(onward);
}

function serve() {
  const files = { cert: readFileSync(cert), key: readFileSync(key), ca: readFileSync(ca) };
  const sessions = new Set();
  const server = createSecureServer({ ...files, requestCert: true, rejectUnauthorized: true, allowHTTP1: true }, passOn);
  server.on("session", (session) => sessions.add(session) && session.on("close", () => sessions.delete(session)));
  server.listen(port, "127.0.0.1");
  return () => {
    server.close();
    sessions.forEach((session) => session.close());
  };
}

let stop = serve();
process.on("SIGHUP", () => {
  stop();
  stop = serve();
});
